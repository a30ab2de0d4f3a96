"""Optimizers and learning-rate schedules by name, and which parameters they are for."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitft.optimizers.muon import Muon

OPTIMIZERS = ("adamw", "adam", "muon")
NUMBERED = re.compile(r"\.\d+\.")  # in the name of a parameter inside a numbered block
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
EMBEDDING = ("patch_embed.", "cls_token", "dist_token", "registers", "pos_embedding", "pre_norm.")
SCHEDULES = ("cosine", "linear", "multistep", "constant")


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    recorded: bool = False,
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together train every parameter that requires a gradient.

    Weight decay is decoupled (arXiv:1711.05101) and applies to matrices and kernels only, see
    `decays`. "muon" trains the matrices inside numbered blocks with Muon and the rest with AdamW.
    "adam" is the article's optimizer, without weight decay.

    Args:
        lr_factors: factors on the learning rate. A key is a module's name, such as "blocks.5" for
            all parameters in that block, or the last part of parameters' names, such as "lora_b".
        layer_decay: factor on a block's learning rate for every block behind it; see `distances`.
        recorded: hold learning rates in tensors, so that a replayed CUDA graph sees their changes.

    Raises:
        ValueError: unknown name, nothing to train, "adam" with weight decay, or "muon" without a
            matrix for it.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")
    if name == "adam" and weight_decay:
        raise ValueError(f"adam has no {weight_decay=}; use --optimizer adamw, or --weight-decay 0")
    groups = _groups(model, name, lr_factors or {}, layer_decay)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    if name == "muon" and not any(muon for muon, _, _ in groups):
        raise ValueError("optimizer muon is for the matrices of blocks, and none trains; use adamw")
    optimizers: list[torch.optim.Optimizer] = []
    for muon in (False, True):
        chosen = [
            {
                "params": parameters,
                "lr": torch.tensor(lr, device=parameters[0].device) if recorded else lr,
                "weight_decay": weight_decay if decay else 0.0,
                "lr_factor": factor,
            }
            for (for_muon, decay, factor), parameters in groups.items()
            if for_muon is muon
        ]
        if chosen and muon:
            optimizers.append(Muon(chosen, lr=lr))
        elif chosen:
            kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
            optimizers.append(kind(chosen, lr=lr, fused=True, capturable=recorded))
    return optimizers


def _groups(
    model: nn.Module, name: str, lr_factors: Mapping[str, float], layer_decay: float
) -> dict[tuple[bool, bool, float], list[nn.Parameter]]:
    """Return the trainable parameters by (for Muon?, with weight decay?, learning-rate factor)."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    behind = distances([key for key, _ in model.named_parameters()])
    for key, parameter, module in owned_parameters(model):
        if parameter.requires_grad:
            last = key.rpartition(".")[2]
            decay = decays(module, last)
            muon = name == "muon" and decay and parameter.ndim == 2 and bool(NUMBERED.search(key))
            outer = [f for outer_name, f in lr_factors.items() if key.startswith(f"{outer_name}.")]
            factor = lr_factors.get(last, 1.0) * math.prod(outer) * layer_decay ** behind[key]
            groups.setdefault((muon, decay, factor), []).append(parameter)
    return groups


def distances(names: Sequence[str]) -> dict[str, int]:
    """Return how many layers come after each parameter, as BEiT counts them (arXiv:2106.08254).

    It is 0 for the head and the last norm, 1 for the last block, and so on; the embedding has the
    highest number.
    """
    numbers = {name: int(n[1]) for name in names if (n := BLOCK.search(name))}
    n_blocks = 1 + max(numbers.values(), default=-1)
    return {
        name: n_blocks - numbers[name]
        if name in numbers
        else (n_blocks + 1 if name.startswith(EMBEDDING) else 0)
        for name in names
    }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield the name of every parameter, the parameter, and the module that holds it."""
    for key, parameter in model.named_parameters():
        yield key, parameter, model.get_submodule(key.rpartition(".")[0])


def decays(module: nn.Module, name: str) -> bool:
    """Return whether weight decay applies to the parameter `name` of this module.

    It applies to matrices and kernels of any shape, also to a factor of rank 1. It does not apply
    to biases, norms, tokens and positions (1, N, D), nor to parameters that the module names in its
    `vectors`, such as the factors of (IA)^3, which are stored as a column as in PEFT.
    """
    parameter = module.get_parameter(name)
    return parameter.ndim in (2, 4) and name not in getattr(module, "vectors", ())


def lr_factor(schedule: str, progress: float, *, warmup: float) -> float:
    """Return the factor on the learning rate at `progress`, the share of the run that is done.

    It rises linearly over the share `warmup`. Then "cosine" and "linear" fall to 0 and "constant"
    stays; "multistep" is the article's: a tenth after 80 of 150 epochs, a hundredth after 130.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    rise = min(1.0, progress / warmup) if warmup else 1.0
    fallen = max(0.0, progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * fallen)),
        "linear": 1 - fallen,
        "multistep": 0.1 ** ((progress >= 80 / 150) + (progress >= 130 / 150)),
        "constant": 1.0,
    }[schedule]
    return rise * factor


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times the group's `lr_factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["lr_factor"])
            else:
                group["lr"] = lr * group["lr_factor"]
