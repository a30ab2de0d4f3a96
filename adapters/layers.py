"""Layers that take a base module's place: the base's own Parameters, and some to train.

Each is switched off by `enabled` and knows how to become a module of the base's class again.
Shapes: `O` out, `I` in, `D` width of a norm.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_exact(x: Tensor) -> bool:
    """Return whether products with x keep a small update that was added to a weight.

    In 16 bits, of x or by autocast, the sum would round it off.
    """
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        x.device.type
    )


class AdapterLayer(nn.Module):
    """A module that took a base module's place.

    Mixed in before the base's class. The base's Parameters keep their names and are the same
    objects; those that it adds are named in `AdapterConfig.peft_tensors`.
    """

    enabled: bool = True  # False computes the base's function

    def merged(self) -> nn.Module:
        """Return a module of the base's class with the adapter baked in.

        Raises:
            ValueError: no module of the base's class computes this function.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged; keep it, or eject it")

    def exported(self) -> dict[str, Tensor]:
        """Return the tensors that a file holds of this layer, among others, by their own names."""
        return self.state_dict()

    def parts(self) -> dict[str, Tensor]:
        """Return what a bank stacks of this layer, see `adapters.many.stacks`.

        Of y = gain (W (in_gain x) + b a x) + bias for a linear, y = gain normalised(x) + bias for a
        norm: those that are not the base's.

        Raises:
            ValueError: it computes another function.
        """
        raise ValueError(f"{type(self).__name__} cannot be stacked in a bank; load it alone")


class AffineLayer(AdapterLayer):
    """A module with one weight and perhaps a bias, and a function that uses nothing else."""

    weight: Any  # a Parameter
    bias: Any  # a Parameter, or None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapted module makes of x, or what the base does."""
        return self.adapted(x) if self.enabled else self.compute(x, self.weight, self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the function of the base's class for this weight and bias."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """Return what the adapted module makes of x."""
        return self.compute(x, self.adapted_weight(), self.adapted_bias())

    def adapted_weight(self) -> Tensor:
        """Return the weight that merging bakes in, in float32 or wider."""
        return wide(self.weight)

    def adapted_bias(self) -> Tensor | None:
        """Return the bias that merging bakes in, in float32 or wider."""
        return None if self.bias is None else wide(self.bias)

    def empty(self) -> nn.Module:
        """Return a module of the base's class, without storage."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a module of the base's class that computes what this layer does in eval mode.

        Raises:
            ValueError: the base's module has no bias to hold the adapter's.
        """
        module, weight, bias = self.empty(), self.adapted_weight(), self.adapted_bias()
        if (bias is None) != (self.bias is None):
            raise ValueError(
                f"{type(self).__name__} cannot be merged: the base's module has no bias to hold "
                "its shift; keep it, or eject it"
            )
        module.weight = nn.Parameter(weight.to(self.weight.dtype))
        if self.bias is not None and bias is not None:
            same = torch.equal(bias, wide(self.bias))
            module.bias = self.bias if same else nn.Parameter(bias.to(self.bias.dtype))
        return module


class AdapterLinear(AffineLayer, nn.Linear):
    """An `nn.Linear` whose weight (O, I) and bias (O,) are the base layer's own Parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight x + bias (..., O) for x (..., I)."""
        return F.linear(x, weight, bias)

    def empty(self) -> nn.Linear:
        """Return a plain `nn.Linear` of the same sizes, without storage."""
        return nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )

    def sums(self, x: Tensor) -> bool:
        """Return whether to add an update to W before it meets x (..., I), not after.

        It pays where the sum costs less than another product with every token. It needs a frozen W,
        and full precision.
        """
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        if not is_exact(x) or x.dtype != self.weight.dtype or x.ndim < 2:
            return False
        return x.numel() // self.in_features > min(self.weight.shape)


class AdapterNorm(AffineLayer, nn.LayerNorm):
    """An `nn.LayerNorm` whose weight and bias (D,) are the base layer's own Parameters."""

    def __init__(self, base: nn.LayerNorm) -> None:
        super().__init__(base.normalized_shape, base.eps, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight times normalised x plus bias, (..., D) for x (..., D)."""
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def empty(self) -> nn.LayerNorm:
        """Return a plain `nn.LayerNorm` of the same size, without storage."""
        return nn.LayerNorm(
            self.normalized_shape, self.eps, bias=self.bias is not None, device="meta"
        )


class Wrapper(AdapterLayer):
    """A module that calls the base's, which has its parts in common with it under their names."""

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        vars(self)["base"] = base  # not a child: its parts' names must stay what they are
        for name, part in base.named_children():
            self.add_module(name, part)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module and of the base's."""
        self.base.training = mode
        return super().train(mode)

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return what the adapted module makes of x, or what the base does."""
        return self.adapted(x, *rest, **named) if self.enabled else self.base(x, *rest, **named)

    def adapted(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return what the adapted module makes of x."""
        raise NotImplementedError
