"""An adapter that PEFT saved on another library's model in, the same for a converted model out.

The converted model has a method `translate(name)`, which returns its names for a module or tensor
of the library, () where it has none. Where one of the library's modules is several of the model's,
as with fused queries, keys and values, each gets its rows of the update.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adapters.config import ends_by_pattern
from adapters.folder import PREFIX, TARGET_KEYS, AdapterFolder

# suffixes of PEFT's tensors -> the axis of the outputs, to split; None: the same for all modules
AXES: dict[str, int | None] = {
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_magnitude_vector": 0,
    "ia3_l": 0,
    "weight": 0,
    "bias": 0,
}


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
    if not theirs or theirs & own:
        return saved
    tensors: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}  # ours -> theirs
    trained: dict[str, None] = {}
    for name, (key, tensor) in zip(names, saved.tensors.items(), strict=True):
        modules, suffix = _split(name, translate)
        if suffix not in AXES:
            raise ValueError(f"tensor {key} has no counterpart in the converted model")
        axis = AXES[suffix]
        parts = [tensor] * len(modules) if axis is None else tensor.chunk(len(modules), dim=axis)
        for module, part in zip(modules, parts, strict=True):
            tensors[f"{PREFIX}{module}.{suffix}"] = part
            if suffix in ("weight", "bias"):
                trained[module] = None
            else:
                adapted[module] = name.removesuffix(f".{suffix}")
    config = _config(saved.config, adapted, [*trained])
    return replace(saved, config=config, tensors=tensors, trained=tuple(trained))


def _adapted(name: str) -> str:
    """Return the module that an adapter's tensor belongs to, "" for one of a trained module."""
    suffixes = (suffix for suffix in AXES if suffix not in ("weight", "bias"))
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
