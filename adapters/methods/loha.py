"""LoHa: the update is the elementwise product of two low-rank matrices (arXiv:2108.06098).

y = (W + scale (B1 A1) * (B2 A2)) x + b; its rank can reach R^2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import RankConfig
from adapters.layers import AdapterLinear, cast_to, wide
from adapters.plain import plain_linear


class DeltaLinear(AdapterLinear):
    """y = (W + delta) x + b, from x (..., I) to y (..., O), for a full delta (O, I)."""

    def delta(self) -> Tensor:
        """Return the update (O, I)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        delta = self.delta()
        if self.folds_update(x):
            return F.linear(x, self.weight + delta, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(cast_to(x, delta), delta).to(y.dtype)

    def adapted_weight(self) -> Tensor:
        """Return W + delta (O, I), in float32 or wider."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return wide(self.weight) + wide(self.delta())


class LoHaLinear(DeltaLinear):
    """y = (W + scale (B1 A1) * (B2 A2)) x + b; A2 starts at zero."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__(base)
        self.scale, new = scale, wide(base.weight.new_empty(0)).new_empty
        self.a1 = nn.Parameter(new(rank, self.in_features))  # (R, I)
        self.b1 = nn.Parameter(new(self.out_features, rank))  # (O, R)
        self.a2 = nn.Parameter(torch.zeros_like(self.a1))  # (R, I)
        self.b2 = nn.Parameter(torch.empty_like(self.b1))  # (O, R)
        for factor in (self.a1, self.b1, self.b2):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """Return the update (O, I)."""
        return self.scale * (self.b1 @ self.a1) * (self.b2 @ self.a2)


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(RankConfig):
    """LoHa: the elementwise product of two low-rank updates (arXiv:2108.06098).

    A layer trains 2 R (O + I) numbers.
    """

    peft_marks = {"peft_type": "LOHA"}
    sizes = {"rank": ("hada_w1_b", 0)}
    peft_tensors = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    peft_ignored = RankConfig.peft_ignored | {"init_weights"}

    def adapt(self, module: nn.Module, name: str) -> LoHaLinear:
        """Return the LoHa layer that replaces a plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`.
        """
        base = plain_linear(module, name)
        rank, alpha = self.rank_and_alpha(name)
        return LoHaLinear(base, rank=rank, scale=alpha / rank)
