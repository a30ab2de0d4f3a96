"""Norms of gradients in, the first step that was not finite out, without waiting for the device."""

import torch
from torch import Tensor


class NotFinite(ValueError):
    """A gradient, a loss or a weight is infinite or no number."""


class FiniteSteps:
    """Counts the steps up to the first whose gradient is not finite, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.start = 0

    def restart(self, step: int) -> None:
        """Count from this step of an epoch on."""
        self.start = step
        self.count.zero_()

    def note(self, norm: Tensor) -> None:
        """Take notice of a step by its gradient's norm ()."""
        self.finite &= norm.isfinite()
        self.count += self.finite

    def first_failed(self) -> int | None:
        """Return the first step of the epoch that was not finite, or None; waits for the device."""
        return None if self.finite else self.start + int(self.count)
