"""AdaptFormer: a bottleneck beside the feed-forward (arXiv:2205.13535, equations 3 and 4).

y = f(x) + scale up(relu(down(x))), where x is the feed-forward's input, the normalised tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import AdapterConfig, check_count, check_dropout, option
from adapters.layers import Wrapper, cast_to, wide
from adapters.plain import OTHER, made_of_children, refuse_channels_first


class ParallelBottleneck(Wrapper):
    """y = f(x) + scale (U dropout(relu(V x + v)) + u), (B, N, D) to (B, N, D); U, u start at 0."""

    down_weight: nn.Parameter  # V: (R, D)
    down_bias: nn.Parameter  # v: (R,)
    up_weight: nn.Parameter  # U: (D, R)
    up_bias: nn.Parameter  # u: (D,)
    update_scale: float
    update_dropout: float

    @classmethod
    def beside(
        cls, base: nn.Module, dim: int, *, name: str, width: int, scale: float, dropout: float
    ) -> "ParallelBottleneck":
        """Return a feed-forward (D to D) with a bottleneck of this width beside it."""
        layer, new = cls.around(base), wide(next(base.parameters()).new_empty(0)).new_zeros
        layer.down_weight = nn.Parameter(new(width, dim))
        layer.down_bias = nn.Parameter(new(width))
        layer.up_weight = nn.Parameter(new(dim, width))
        layer.up_bias = nn.Parameter(new(dim))
        layer.update_scale, layer.update_dropout = scale, dropout
        layer.adapted_name = name
        nn.init.kaiming_uniform_(layer.down_weight, a=math.sqrt(5))
        return layer

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return y (B, N, D) for x (B, N, D); or (B, H, W, D) for such images.

        Raises:
            ValueError: x is not of this width, or y of another shape than x.
        """
        y: Tensor = super().forward(x, *rest, **named)
        if not self.enabled:
            return y
        dim = len(self.up_bias)
        if x.shape[-1] != dim or y.shape != x.shape:
            raise ValueError(
                f"AdaptFormer adds to tokens (B, N, {dim}), but {self.adapted_name!r} gives "
                f"{tuple(y.shape)} for {tuple(x.shape)}; {OTHER}"
            )
        hidden = F.relu(F.linear(cast_to(x, self.down_weight), self.down_weight, self.down_bias))
        hidden = F.dropout(hidden, self.update_dropout, self.training)
        update = F.linear(hidden, self.update_scale * self.up_weight)
        return y + (update + self.update_scale * self.up_bias).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(AdapterConfig):
    """AdaptFormer: a small feed-forward beside each feed-forward (arXiv:2205.13535).

    A block trains 2 D R + R + D numbers. It can't be merged: its nonlinearity is not the
    feed-forward's.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = ("ffn",)
    width: int = option(64, "width of the bottleneck")
    scale: float = option(0.1, "factor of the bottleneck's output")
    dropout: float = option(0.0, "dropout in the bottleneck, in training only")

    peft_marks = {"peft_type": "ADAPTFORMER"}
    sizes = {"width": ("adaptformer_down.weight", 0)}
    peft_options = AdapterConfig.peft_options | {
        "width": "width",
        "scale": "scale",
        "dropout": "dropout",
    }
    peft_tensors = {
        "down_weight": "adaptformer_down.weight",
        "down_bias": "adaptformer_down.bias",
        "up_weight": "adaptformer_up.weight",
        "up_bias": "adaptformer_up.bias",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("width", self.width, "64 is usual")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale!r} is not positive; 0.1 is usual")
        check_dropout(self.dropout)

    def adapt(self, module: nn.Module, name: str) -> ParallelBottleneck:
        """Return the layer that replaces a feed-forward: linears and what is between them.

        Raises:
            ValueError: `module` holds Parameters itself, its first linear's input is not as wide
                as its last one's output, or it takes channels first.
        """
        linears = [
            part for part in made_of_children(module, name).modules() if isinstance(part, nn.Linear)
        ]
        if not linears or linears[0].in_features != linears[-1].out_features:
            raise ValueError(
                f"{name!r} is no feed-forward, whose output is as wide as its input; "
                "AdaptFormer adapts feed-forwards"
            )
        refuse_channels_first(module, name, linears[0].in_features)
        return ParallelBottleneck.beside(
            module,
            linears[0].in_features,
            name=name,
            width=self.width,
            scale=self.scale,
            dropout=self.dropout,
        )
