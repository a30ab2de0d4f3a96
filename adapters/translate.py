"""An adapter that PEFT saved on another library's model in, the same for a converted model out.

The converted model has a method `translate(name)`, which returns its names for a module or tensor
of the library, () where it has none. Where one of the library's modules is several of the model's,
as with fused queries, keys and values, each gets its rows of the update.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adapters.config import ends_by_pattern
from adapters.folder import PREFIX, TARGET_KEYS, AdapterFolder
from adapters.methods.ia3 import is_of_inputs
from adapters.methods.loha import LoHaConfig
from adapters.methods.lokr import LoKrConfig
from adapters.methods.vera import VeRAConfig

# suffixes of PEFT's tensors -> the axis of the outputs, to split; None: the same for all modules
AXES: dict[str, int | None] = {
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_magnitude_vector": 0,
    "ia3_l": 0,  # (1, I) where it multiplies inputs
    "ln_tuning_layers.weight": 0,
    "ln_tuning_layers.bias": 0,
    "weight": 0,
    "bias": 0,
}
# suffixes of tensors that have no parts for parts of a module
WHOLE = frozenset(
    suffix
    for config in (LoHaConfig, LoKrConfig, VeRAConfig)
    for suffix in config.peft_tensors.values()
)


def translated(saved: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """Return the adapter under the model's names, unchanged where it has them already.

    Raises:
        ValueError: a tensor has no counterpart in the model.
    """
    translate = getattr(model, "translate", None)
    own = {name for name, _ in model.named_modules()}
    names = [key.removeprefix(PREFIX) for key in saved.tensors]
    if translate is None or saved.method is not None or not names:
        return saved
    theirs = {module for name in names if (module := _adapted(name))}
    if theirs <= own:
        return saved
    feedforward = _feedforward(saved.config)
    tensors: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}  # ours -> theirs
    trained: dict[str, None] = {}
    for name, (key, tensor) in zip(names, saved.tensors.items(), strict=True):
        if not key.startswith(PREFIX):  # one for all modules, as VeRA's matrices
            tensors[key] = tensor
            continue
        modules, suffix = _split(name, translate)
        of_inputs = suffix == "ia3_l" and is_of_inputs(_adapted(name), feedforward)
        parts = _parts(key, suffix, tensor, modules, of_inputs=of_inputs)
        for module, part in zip(modules, parts, strict=True):
            tensors[f"{PREFIX}{module}.{suffix}"] = part
            if suffix in ("weight", "bias"):
                trained[module] = None
            else:
                adapted[module] = name.removesuffix(f".{suffix}")
    config = _config(saved.config, adapted, [*trained])
    if feedforward:
        config["feedforward_modules"] = [
            module for module, theirs in adapted.items() if is_of_inputs(theirs, feedforward)
        ]
    return replace(saved, config=config, tensors=tensors, trained=tuple(trained))


def _feedforward(config: dict[str, Any]) -> str | list[str]:
    """Return `feedforward_modules`; [] where it is missing, or wrong, which `from_peft` says."""
    found = config.get("feedforward_modules")
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    return found if isinstance(found, str) else []


def _parts(
    key: str, suffix: str, tensor: Tensor, modules: Sequence[str], *, of_inputs: bool
) -> Sequence[Tensor]:
    """Return the part of a tensor, called `key`, that each of our modules gets.

    Args:
        key: the tensor's name, for messages.
        suffix: of it, a key of AXES or one of WHOLE.
        tensor: to split.
        modules: ours that it is for.
        of_inputs: it multiplies inputs, which are the same for all modules.

    Raises:
        ValueError: there are no modules for it, or it has no such parts.
    """
    if suffix not in AXES and suffix not in WHOLE:
        raise ValueError(f"tensor {key} has no counterpart in the converted model")
    n, axis = len(modules), AXES.get(suffix)
    if axis is None or of_inputs:
        if suffix in WHOLE and n > 1:
            raise ValueError(f"tensor {key} has no parts for {', '.join(modules)}")
        return [tensor] * n
    if tensor.ndim <= axis or tensor.shape[axis] % n:
        raise ValueError(f"tensor {key} has shape {[*tensor.shape]}, not {n} equal parts")
    return tensor.chunk(n, dim=axis)


def _adapted(name: str) -> str:
    """Return the module that an adapter's tensor belongs to, "" for one of a trained module."""
    suffixes = {*AXES, *WHOLE} - {"weight", "bias"}
    return next((name.removesuffix(f".{s}") for s in suffixes if name.endswith(f".{s}")), "")


def _split(name: str, translate: Any) -> tuple[tuple[str, ...], str]:
    """Return our modules and the suffix for PEFT's name of a tensor; (), "" where unknown."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if modules := translate(".".join(parts[:cut])):
            return modules, ".".join(parts[cut:])
    return (), ""


def _config(written: dict[str, Any], adapted: dict[str, str], trained: list[str]) -> dict[str, Any]:
    """Return an adapter_config.json's entries under our names; patterns get an entry a module.

    Args:
        written: the entries.
        adapted: our name of each adapted module -> the library's.
        trained: our names of the modules that trained too.
    """
    kept = {key: value for key, value in written.items() if key not in TARGET_KEYS}
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = written.get(option)
        if isinstance(patterns, dict):  # otherwise `from_peft` says what is wrong
            first = {
                module: next((v for key, v in patterns.items() if ends_by_pattern(name, key)), None)
                for module, name in adapted.items()
            }
            kept[option] = {module: v for module, v in first.items() if v is not None}
    names = {"target_modules": [*adapted], "modules_to_save": trained or None}
    return kept | names | {"task_type": None}
