"""Updates B A of linears: from a saved LoRA, closest to a full one, and saved as a LoRA again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.folder import PREFIX, AdapterFolder
from adapters.layers import wide
from adapters.methods.lora import LoRAConfig
from adapters.peft import by_names

Factors = tuple[Tensor, Tensor]  # A (R, I) and B (O, R) of an update B A
A, B = ".lora_A.weight", ".lora_B.weight"


def read_updates(saved: AdapterFolder, folder: str) -> dict[str, Factors]:
    """Return A and scale B for every adapted module by name, in float32 or wider.

    Raises:
        ValueError: the adapter is no LoRA, a tensor is missing, or one is not understood.
    """
    if not LoRAConfig.reads(saved.config):
        raise ValueError(f"{folder} is no LoRA adapter, whose updates can be added up")
    names = {k[len(PREFIX) : -len(A)] for k in saved.tensors if k.endswith(A)}
    trained = tuple(saved.config.get("modules_to_save") or ())
    for key in saved.tensors:
        module = key[len(PREFIX) :].rpartition(".")[0]
        if not (key.endswith((A, B)) or module.endswith(trained)):
            raise ValueError(f"{folder}: {key} is no factor of a linear, and would be lost")
    config = LoRAConfig.from_peft(by_names(saved.config, sorted(names) or ["none"]))
    found = {}
    for name in sorted(names):
        if (missing := f"{PREFIX}{name}{B}") not in saved.tensors:
            raise ValueError(f"{folder}: tensor {missing} is missing")
        a, b = (wide(saved.tensors[f"{PREFIX}{name}{end}"]) for end in (A, B))
        found[name] = a, config.scale(name) * b
    return found


def closest(update: Tensor, rank: int) -> tuple[Factors, float]:
    """Return A (R, I), B (O, R) with B A closest to `update` (O, I), and the share kept.

    The share is ||B A||^2 / ||update||^2, 1 for an update of zeros.
    """
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    root, energy = s[:rank].sqrt(), s.square().sum()
    share = (s[:rank].square().sum() / energy).item() if energy else 1.0
    return (root[:, None] * v[:rank], u[:, :rank] * root), share


def lora_folder(
    factors: Mapping[str, Factors],
    trained: Mapping[str, Tensor],
    names: Sequence[str] | None,
    fingerprint: str | None,
    classes: tuple[str, ...] | None,
    preprocessing: dict[str, Any] | None,
) -> AdapterFolder:
    """Return updates B A as a saved LoRA, with tensors and names of the trained modules."""
    written = _config(factors).to_peft() | {"modules_to_save": names, "task_type": None}
    ends = ((A, 0), (B, 1))
    thin = {f"{PREFIX}{name}{end}": ab[i] for name, ab in factors.items() for end, i in ends}
    return AdapterFolder(
        written, thin | dict(trained), fingerprint, classes, preprocessing=preprocessing
    )


def _config(factors: Mapping[str, Factors]) -> LoRAConfig:
    """Return the config of updates B A of these ranks, with scale 1."""
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    most = max(ranks.values())
    fewer = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank < most}
    return LoRAConfig(
        targets=tuple(factors), rank=most, alpha=most, rank_pattern=fewer, alpha_pattern=fewer
    )
