"""Weights after each step in; their moving average, which is validated and saved, out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of weights (Polyak and Juditsky, 1992).

    While (1 + t) / (10 + t) is less than `decay`, it is the decay after step t. So the average soon
    forgets the weights that training started from.

    Args:
        parameters: those that train, by name.
        decay: share of the earlier average that remains after a step; 0 for no average.

    Attributes:
        values: the average by name; {} where there is none, and before the first step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Move the average towards the weights after step `t`, counted from 0."""
        if not self.decay:
            return
        if not self.values:
            self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        weights: list[Tensor] = [self.parameters[name] for name in self.values]
        decay = min(self.decay, (1 + t) / (10 + t))
        torch._foreach_lerp_([*self.values.values()], weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters hold the average, where there is one; restore them afterwards."""
        kept = {name: self.parameters[name].detach().clone() for name in self.values}
        put(self.values, self.parameters)
        try:
            yield
        finally:
            put(kept, self.parameters)


@torch.no_grad()
def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the values into the parameters of these names; both are whole, or sharded alike."""
    for name, value in values.items():
        parameters[name].copy_(value)
