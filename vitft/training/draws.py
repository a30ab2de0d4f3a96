"""The random numbers of a run: their state, and which stages of a model vary by them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitft.evaluation.evaluate import evaluating
from vitft.model.vit import VisionTransformer


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the random numbers drawn for `device`: the CPU's, and its own."""
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return [torch.get_rng_state(), *([own[device.type]()] if device.type in own else [])]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Go on drawing from what `random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


def seeded_state(seed: int, device: torch.device) -> list[Tensor]:
    """Return the random state that `seed` starts; the present one stays what it is."""
    before = random_state(device)
    try:
        torch.manual_seed(seed)
        return random_state(device)
    finally:
        set_random_state(before, device)


@torch.no_grad()
def first_varying_stage(model: VisionTransformer) -> int:
    """Return the first stage that is not the same in every pass of training; their number if none.

    It draws random numbers, or changes a buffer, as batch norm does. Found by a pass of two black
    images, so that it holds for any module: dropout of every kind, of paths and in attention, too.
    The model and the random state stay what they are.
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
