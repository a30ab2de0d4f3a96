"""AdaptFormer: a bottleneck beside the feed-forward (arXiv:2205.13535, equations 3 and 4).

y = f(x) + scale up(relu(down(x))), where x is what the feed-forward reads, the normalised tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import AdapterConfig, check_count, check_dropout, option, partless
from adapters.layers import Wrapper


class ParallelBottleneck(Wrapper):
    """y = f(x) + scale U relu(V dropout(x) + v) + u, (B, N, D) to (B, N, D); U and u start at 0."""

    def __init__(self, base: nn.Module, dim: int, *, width: int, scale: float, dropout: float):
        super().__init__(base)
        like = next(base.parameters())
        self.down_weight = nn.Parameter(like.new_empty(width, dim))  # V: (R, D)
        self.down_bias = nn.Parameter(like.new_zeros(width))  # v: (R,)
        self.up_weight = nn.Parameter(like.new_zeros(dim, width))  # U: (D, R)
        self.up_bias = nn.Parameter(like.new_zeros(dim))  # u: (D,)
        self.hidden_dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))

    def adapted(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return y (B, N, D) for x (B, N, D)."""
        hidden = self.hidden_dropout(F.relu(F.linear(x, self.down_weight, self.down_bias)))
        update = F.linear(hidden, self.scale * self.up_weight, self.scale * self.up_bias)
        y: Tensor = self.base(x, *rest, **named) + update
        return y


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(AdapterConfig):
    """AdaptFormer: a small feed-forward beside each feed-forward (arXiv:2205.13535).

    A block trains 2 D R + R + D numbers. It can't be merged: its ReLU stands beside another
    nonlinearity.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = ("ffn",)
    width: int = option(64, "hidden numbers of the bottleneck")
    scale: float = option(0.1, "factor of the bottleneck's output")
    dropout: float = option(0.0, "of the bottleneck's hidden numbers, in training only")

    peft_marks = {"peft_type": "ADAPTFORMER"}
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
        """Return the layer that takes the place of a feed-forward: linears, and what is between.

        Raises:
            ValueError: `module` holds Parameters itself, or its first linear does not read as many
                numbers as its last one gives.
        """
        linears = [part for part in partless(module, name).modules() if isinstance(part, nn.Linear)]
        if not linears or linears[0].in_features != linears[-1].out_features:
            raise ValueError(
                f"{name!r} is no feed-forward, whose output is as wide as its input; "
                "AdaptFormer adapts feed-forwards"
            )
        return ParallelBottleneck(
            module,
            linears[0].in_features,
            width=self.width,
            scale=self.scale,
            dropout=self.dropout,
        )
