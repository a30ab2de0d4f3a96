"""Optimizers and learning-rate schedules by name: trainable parameters, options in; updates out."""

import math
from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "adam", "muon")
SCHEDULES = ("cosine", "linear", "multistep", "constant")


def build_optimizers(
    model: nn.Module, *, name: str, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together train every parameter that requires a gradient.

    Weight decay is decoupled (arXiv:1711.05101) and spares biases, norms, the class token and the
    positions. "muon" orthogonalises the updates of the blocks' matrices, scaled so that AdamW's
    `lr` fits it (arXiv:2502.16982), and leaves the rest to AdamW. "adam" is the article's: it has
    no weight decay.

    Raises:
        ValueError: unknown name, nothing to train, or "adam" with weight decay.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    if not trainable:
        raise ValueError("nothing to train: no parameter requires a gradient")
    if name == "adam":
        if weight_decay:
            raise ValueError(
                f"adam has no {weight_decay=}; use --optimizer adamw, or --weight-decay 0"
            )
        return [torch.optim.Adam(trainable.values(), lr=lr, fused=True)]
    hidden = [value for key, value in trainable.items() if value.ndim == 2 and "blocks." in key]
    matrices = {id(value) for value in hidden} if name == "muon" else set()
    rest = [value for value in trainable.values() if id(value) not in matrices]
    groups = [
        {"params": [value for value in rest if decays(value)], "weight_decay": weight_decay},
        {"params": [value for value in rest if not decays(value)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, fused=True))
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay is for it: a matrix or a convolution's kernel."""
    return parameter.ndim in (2, 4)


def lr_factor(schedule: str, progress: float, *, warmup: float) -> float:
    """Return what to multiply the learning rate by at `progress` 0..1 through the run.

    It rises linearly over the share `warmup`; then "cosine" and "linear" fall to 0, "multistep" is
    the article's (a tenth after 80 and again after 130 of 150 epochs) and "constant" stays.

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
    """Give every parameter group the learning rate `lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
