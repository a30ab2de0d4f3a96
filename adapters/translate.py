"""A folder that PEFT saved on another library's model in, the same for a converted model out.

A model that has `translate(name)`, which gives its own names for one of the library's modules or
tensors, () where it has none, takes such folders. Where several of its modules are one of theirs,
as with fused queries, keys and values, each gets its rows of the update.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

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
    ours = [name for name in names if _adapts(name)]
    if not ours or any(name.rsplit(".", n)[0] in own for name in ours for n in (1, 2)):
        return saved
    tensors: dict[str, Tensor] = {}
    adapted: dict[str, None] = {}
    trained: dict[str, None] = {}
    for name, (key, tensor) in zip(names, saved.tensors.items(), strict=True):
        modules, suffix = _split(name, translate)
        if suffix not in SIDES:
            raise ValueError(f"tensor {key} has no counterpart in the converted model")
        side = SIDES[suffix]
        parts = [tensor] * len(modules) if side is None else tensor.chunk(len(modules), dim=side)
        found = trained if suffix in ("weight", "bias") else adapted
        for module, part in zip(modules, parts, strict=True):
            tensors[f"{PREFIX}{module}.{suffix}"] = part
            found[module] = None
    config = _config(saved.config, [*adapted], [*trained])
    return replace(saved, config=config, tensors=tensors, trained=tuple(trained))


def _adapts(name: str) -> bool:
    """Return whether a tensor is an adapter's, not one of a module that trained whole."""
    return any(name.endswith(f".{suffix}") for suffix in SIDES if suffix not in ("weight", "bias"))


def _split(name: str, translate: Any) -> tuple[tuple[str, ...], str]:
    """Return our modules and the suffix of a tensor that PEFT calls `name`, (), "" if unknown."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if modules := translate(".".join(parts[:cut])):
            return modules, ".".join(parts[cut:])
    return (), ""


def _config(written: dict[str, Any], adapted: list[str], trained: list[str]) -> dict[str, Any]:
    """Return an adapter_config.json's entries with our names.

    Raises:
        ValueError: it has patterns, which speak of the library's names.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        if written.get(key):
            raise ValueError(f"{key}={written[key]!r} speaks of names that the conversion changed")
    kept = {key: value for key, value in written.items() if key not in (*CHOOSING, LAYERS)}
    names = {"target_modules": adapted, "modules_to_save": trained or None}
    return kept | names | {"task_type": None}
