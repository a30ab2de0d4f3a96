"""Weights after each step in; their moving average, which is validated and kept, out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of weights (Polyak and Juditsky, 1992).

    Until it knows enough steps its decay is (1 + t) / (10 + t) after step t, so that it is not held
    back by what training started from.

    Args:
        parameters: by name.
        decay: share of the average that a step leaves; 0 for no average.

    Attributes:
        values: the average by name; {} without one, and before the first step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, t: int) -> None:
        """Take notice of the weights after step `t`, from 0."""
        if not self.decay:
            return
        if not self.values:
            self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        weights: list[Tensor] = [self.parameters[name] for name in self.values]
        decay = min(self.decay, (1 + t) / (10 + t))
        torch._foreach_lerp_([*self.values.values()], weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average, where there is one, and its own weights back after."""
        kept = {name: self.parameters[name].detach().clone() for name in self.values}
        put(self.values, self.parameters)
        try:
            yield
        finally:
            put(kept, self.parameters)


@torch.no_grad()
def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Give parameters the values, by name; both are whole, or sharded alike."""
    for name, value in values.items():
        parameters[name].copy_(value)
