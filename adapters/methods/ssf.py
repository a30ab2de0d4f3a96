"""SSF: scale and shift every operation's output, y = gamma * f(x) + beta (arXiv:2210.08823)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.config import LINEARS, AdapterConfig
from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer, wide
from adapters.plain import plain


class ScaleAndShift(AffineLayer):
    """y = gamma * f(x) + beta, (..., O) for x (..., I); gamma starts at one and beta at zero.

    Around a norm over several axes, both have its weight's shape.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        shape = self.weight.shape[:1] if isinstance(self, nn.Linear) else self.weight.shape
        self.gamma = nn.Parameter(wide(self.weight.new_ones(shape)))  # (O,)
        self.beta = nn.Parameter(wide(self.weight.new_zeros(shape)))  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        y = self.compute(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return torch.addcmul(self.beta, y.to(self.beta.dtype), self.gamma).to(y.dtype)

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        if not isinstance(self, nn.Linear):  # a norm, whose gain is its weight
            return {"gain": self.adapted_weight(), "bias": self.adapted_bias()}
        return {"gain": self.gamma, "bias": self.adapted_bias()}

    def adapted_weight(self) -> Tensor:
        """Return diag(gamma) W (O, I) of a linear, gamma * w (D,) of a norm, cast by `wide`."""
        gamma = wide(self.gamma)
        return (gamma[:, None] if isinstance(self, nn.Linear) else gamma) * wide(self.weight)

    def adapted_bias(self) -> Tensor:
        """Return gamma * b + beta (O,), in float32 or wider."""
        beta = wide(self.beta)
        return beta if self.bias is None else wide(self.gamma) * wide(self.bias) + beta


class SSFLinear(ScaleAndShift, AdapterLinear):
    """y = gamma * (W x + b) + beta."""


class SSFNorm(ScaleAndShift, AdapterNorm):
    """y = gamma * norm(x) + beta."""


@dataclass(frozen=True, kw_only=True)
class SSFConfig(AdapterConfig):
    """SSF: a trained scale and shift behind linears and norms (arXiv:2210.08823).

    A layer trains 2 O numbers. A linear without bias can't be merged: no Parameter holds its shift.
    """

    targets: tuple[str, ...] = (*LINEARS, "norm1", "norm2")

    peft_marks = {"peft_type": "SSF"}
    peft_tensors = {"gamma": "ssf_gamma", "beta": "ssf_beta"}

    def adapt(self, module: nn.Module, name: str) -> ScaleAndShift:
        """Return the SSF layer that replaces a plain `nn.Linear` or `nn.LayerNorm`.

        Raises:
            ValueError: `module` is neither.
        """
        base = plain(module, name, nn.Linear, nn.LayerNorm)
        return SSFLinear(base) if isinstance(base, nn.Linear) else SSFNorm(base)
