"""Tensors under a family's names in, under ours out; an unknown name is an error."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitft.families.names import FAMILIES, Family

PARAMETERS = ("weight", "bias")
CHUNK = re.compile(r"(?<=\.)\d+\.(?=\d+\.)")  # in "blocks.1.11.norm1", as DINOv2's large files have


def rename(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return the tensors under our names; one of theirs may be split into several of ours.

    Raises:
        ValueError: a name is unknown, or a tensor cannot be split.
    """
    found: dict[str, Tensor] = {}
    left: list[str] = []
    masks = {key: value for key, value in tensors.items() if key.endswith(".bias_mask")}
    prefix = next((p for p in family.prefixes if any(k.startswith(p) for k in tensors)), "")
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        ours = ours_of(name, family)
        if not ours:
            if not any(re.fullmatch(pattern, key) for pattern in family.unused) and not any(
                re.fullmatch(pattern, name) for pattern in family.unused
            ):
                left.append(key)
            continue
        mask = masks.get(f"{key}_mask", tensor)
        if not tensor.ndim or len(tensor) % len(ours) or mask.shape != tensor.shape:
            raise ValueError(f"tensor {key} has shape {tuple(tensor.shape)}, which does not fit")
        if mask is not tensor:  # DINOv3's k has no bias
            tensor = torch.where(mask.isfinite() & (mask != 0), tensor, torch.zeros_like(tensor))
        for one, part in zip(ours, tensor.chunk(len(ours)), strict=True):
            found[one] = part
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"tensor {left[0]!r}{more} has no place in this family")
    return found


def ours_of(name: str, family: Family) -> tuple[str, ...]:
    """Return our names for a module or tensor of a family, () where its name is unknown."""
    name = CHUNK.sub("", name)
    numbers = [*re.finditer(r"(?<=\.)\d+(?=\.)", name)]
    patterns = [(name, "")] + [
        (f"{name[: n.start()]}{{i}}{name[n.end() :]}", n.group()) for n in numbers
    ]
    for pattern, number in patterns:
        module, _, kind = pattern.rpartition(".")
        if pattern in family.names:
            ours, ending = family.names[pattern], ""
        elif kind in PARAMETERS and module in family.names:
            ours, ending = family.names[module], f".{kind}"
        else:
            continue
        names = (ours,) if isinstance(ours, str) else ours
        return tuple(one.replace("{i}", number) + ending for one in names)
    return ()


def translate(name: str, family_name: str) -> tuple[str, ...]:
    """Return our names for a module or tensor, () if its name or the family is unknown."""
    family = FAMILIES.get(family_name)
    if family is None:
        return ()
    prefix = next((p for p in family.prefixes if name.startswith(p)), "")
    return ours_of(name.removeprefix(prefix), family)
