"""A folder that PEFT saved on another library's model in, the same for a converted model out.

A model that has `translate(name)`, which gives its own names for one of the library's modules or
tensors, () where it has none, takes such folders. Where several of its modules are one of theirs,
as with fused queries, keys and values, each gets its rows of the update.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adapters.config import ends_by_pattern
from adapters.folder import CHOOSING, LAYERS, PREFIX, AdapterFolder

# suffixes of PEFT's tensors -> the side along which outputs lie; None: the same for all modules
SIDES: dict[str, int | None] = {
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_magnitude_vector": 0,
    "ia3_l": 0,
    "weight": 0,
    "bias": 0,
}


def translated(saved: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """Return the folder under the model's names, or as it is where its names are the model's.

    Raises:
        ValueError: a part of it has no counterpart in the model; names it.
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
        if suffix not in SIDES:
            raise ValueError(f"tensor {key} has no counterpart in the converted model")
        side = SIDES[suffix]
        parts = [tensor] * len(modules) if side is None else tensor.chunk(len(modules), dim=side)
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
    suffixes = (suffix for suffix in SIDES if suffix not in ("weight", "bias"))
    return next((name.removesuffix(f".{s}") for s in suffixes if name.endswith(f".{s}")), "")


def _split(name: str, translate: Any) -> tuple[tuple[str, ...], str]:
    """Return our modules and the suffix of a tensor that PEFT calls `name`, (), "" if unknown."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if modules := translate(".".join(parts[:cut])):
            return modules, ".".join(parts[cut:])
    return (), ""


def _config(written: dict[str, Any], adapted: dict[str, str], trained: list[str]) -> dict[str, Any]:
    """Return an adapter_config.json's entries with our names; patterns become one entry a module.

    Args:
        written: the entries.
        adapted: our name of each adapted module -> theirs.
        trained: our names of the modules that trained besides.
    """
    kept = {key: value for key, value in written.items() if key not in (*CHOOSING, LAYERS)}
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = written.get(option)
        if isinstance(patterns, dict):  # else its reader says what is wrong
            first = {
                module: next((v for key, v in patterns.items() if ends_by_pattern(name, key)), None)
                for module, name in adapted.items()
            }
            kept[option] = {module: v for module, v in first.items() if v is not None}
    names = {"target_modules": [*adapted], "modules_to_save": trained or None}
    return kept | names | {"task_type": None}
