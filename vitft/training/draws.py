"""The random state of a run, and the first stage of a model that depends on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitft.evaluation.evaluate import evaluating
from vitft.model.vit import VisionTransformer


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the CPU's random generator and, behind it, that of another `device`."""
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return [torch.get_rng_state(), *([own[device.type]()] if device.type in own else [])]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Restore the random state that `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


def seeded_state(seed: int, device: torch.device) -> list[Tensor]:
    """Return the random state after seeding with `seed`; the present state does not change."""
    before = random_state(device)
    try:
        torch.manual_seed(seed)
        return random_state(device)
    finally:
        set_random_state(before, device)


def varies(model: VisionTransformer) -> bool:
    """Return whether a model draws random numbers or changes a buffer in training."""
    return first_varying_stage(model) < len(model.stages())


@torch.no_grad()
def first_varying_stage(model: VisionTransformer) -> int:
    """Return the first stage that draws random numbers or changes a buffer in training.

    Dropout of any kind draws, and batch norm changes a buffer. A pass of two zero images finds the
    stage, so any module is covered. Model and random state are restored afterwards.

    Returns:
        The stage's index; the number of stages where there is none.
    """
    device = model.head.weight.device
    before, buffers = random_state(device), [(b, b.clone()) for b in model.buffers()]
    size = model.image_size
    x = torch.zeros(2, model.config.n_channels, size, size, device=device)
    x = x.to(model.head.weight.dtype)
    with evaluating(model):
        try:
            model.train()
            for i in range(len(model.stages())):
                x = model.run(x, i, i + 1)
                drew = not all(map(torch.equal, before, random_state(device)))
                if drew or not all(torch.equal(b, value) for b, value in buffers):
                    return i
            return len(model.stages())
        finally:
            set_random_state(before, device)
            for buffer, value in buffers:
                buffer.copy_(value)
