"""Adapter+: a bottleneck behind each block, on its output (arXiv:2406.06820, sections 3 and 4).

y = z + c (U gelu(V z + v) + u), where z is the block's output and c has a number for each channel.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import AdapterConfig, check_count, option
from adapters.layers import Wrapper, cast_to, wide
from adapters.plain import OTHER, block_width

DEVIATION = 0.01  # of U and V initially; truncated at two of it, as in arXiv:1902.00751


class PostAdapter(Wrapper):
    """y = z + c (U gelu(V z + v) + u) for a block's output z, (B, N, D) to (B, N, D)."""

    down_weight: nn.Parameter  # V: (R, D)
    down_bias: nn.Parameter  # v: (R,)
    up_weight: nn.Parameter  # U: (D, R)
    up_bias: nn.Parameter  # u: (D,)
    channel_scale: nn.Parameter  # c: (D,)

    @classmethod
    def behind(cls, base: nn.Module, dim: int, *, name: str, width: int) -> "PostAdapter":
        """Return a block of width `dim` with a bottleneck of this width behind it."""
        layer, new = cls.around(base), wide(next(base.parameters()).new_empty(0)).new_zeros
        layer.down_weight = nn.Parameter(new(width, dim))
        layer.down_bias = nn.Parameter(new(width))
        layer.up_weight = nn.Parameter(new(dim, width))
        layer.up_bias = nn.Parameter(new(dim))
        layer.channel_scale = nn.Parameter(new(dim) + 1)
        layer.adapted_name = name
        for weight in (layer.down_weight, layer.up_weight):
            nn.init.trunc_normal_(weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
        return layer

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """Return y (B, N, D) for the block's input x (B, N, D); or (B, H, W, D) for such images.

        Raises:
            ValueError: the block returns something other than tokens.
        """
        z = super().forward(x, *rest, **named)
        if not self.enabled:
            return z
        dim = len(self.channel_scale)
        if not isinstance(z, Tensor) or z.shape[-1:] != (dim,):
            given = tuple(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise ValueError(
                f"Adapter+ changes tokens (B, N, {dim}), but {self.adapted_name!r} gives {given}; "
                f"{OTHER}"
            )
        hidden = F.gelu(F.linear(cast_to(z, self.down_weight), self.down_weight, self.down_bias))
        update = self.channel_scale * F.linear(hidden, self.up_weight, self.up_bias)
        return z + update.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class AdapterPlusConfig(AdapterConfig):
    """Adapter+: a small feed-forward behind each block, its output scaled (arXiv:2406.06820).

    A block trains 2 D R + R + 2 D numbers. It can't be merged: no weight of the base holds its
    nonlinearity. Its initial function is close to the base's, but not equal.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = (r"(.*\.)?blocks\.\d+",)
    width: int = option(8, "width of the bottleneck")

    peft_marks = {"peft_type": "ADAPTER_PLUS"}
    sizes = {"width": ("adapter_down.weight", 0)}
    peft_options = AdapterConfig.peft_options | {"width": "width"}
    peft_tensors = {
        "down_weight": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up_weight": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
        "channel_scale": "adapter_scale",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("width", self.width, "8 is usual")

    def adapt(self, module: nn.Module, name: str) -> PostAdapter:
        """Return the layer that replaces a block with layer norms on its tokens.

        Raises:
            ValueError: `module` holds Parameters itself, has no layer norm, or takes channels
                first.
        """
        dim = block_width(module, name, "Adapter+")
        return PostAdapter.behind(module, dim, name=name, width=self.width)
