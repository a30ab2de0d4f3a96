"""Layers that replace modules of the base: they hold its Parameters, and new ones to train.

`enabled` switches the adapter off, and `merged` gives a module of the base's class again. New
Parameters are in float32 or wider, also on a base of 16 bits, which would round their updates away.
Shapes: `O` out, `I` in, `D` width of a norm.
"""

import copy
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

W = TypeVar("W", bound="Wrapper")


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, or float32 where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def cast_to(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the dtype of `like`; unchanged under autocast, which casts by itself."""
    return x if _is_autocast(x) else x.to(like.dtype)


def keeps_small_updates(x: Tensor) -> bool:
    """Return whether a weight plus a small update differs from the weight in the precision of x.

    In 16 bits, by the dtype of x or by autocast, rounding can lose the update; so it can in TF32,
    which has float16's precision, where products of float32 may be computed in it.
    """
    if x.dtype not in (torch.float32, torch.float64) or _is_autocast(x):
        return False
    return x.dtype == torch.float64 or not _rounds_products(x.device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rounds_products(device: str) -> bool:
    """Return whether products of float32 may be computed in TF32 or bfloat16 on a kind of device.

    It is `torch.backends.cuda.matmul.fp32_precision`, whose own code takes ten times as long.
    """
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device)
    if backend is None:
        return False
    return torch._C._get_fp32_precision_getter(backend, "matmul") not in ("none", "ieee")


def _is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class AdapterLayer(nn.Module):
    """A module that replaces a module of the base.

    It is a mixin, placed before the base's class. The base's Parameters keep their names and are
    the same objects; `AdapterConfig.peft_tensors` names those that a layer adds.
    """

    enabled: bool = True  # False computes the base's function
    vectors: frozenset[str] = frozenset()  # parameters that are vectors, stored as matrices

    def merged(self, base: nn.Module) -> nn.Module:
        """Return a module like `base` with the adapter baked in.

        Args:
            base: the module that this layer replaced.

        Raises:
            ValueError: no module of the base's class computes this function.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged; keep it, or eject it")

    def exported(self) -> dict[str, Tensor]:
        """Return the layer's tensors by name; files hold those in `peft_tensors`."""
        return self.state_dict()

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that the adapter adds or changes, by their names.

        For a linear they are gain (O,), in_gain (I,), a (R, I), b (O, R) and bias (O,) of
        y = gain (W (in_gain x) + b a x) + bias; for a norm, gain and bias (D,) of
        y = gain normalised(x) + bias. A bank stacks them.

        Raises:
            ValueError: the layer's function has another form.
        """
        raise ValueError(f"{type(self).__name__} cannot be stacked in a bank; load it alone")


class AffineLayer(AdapterLayer):
    """A layer whose base has one weight, perhaps a bias, and a function of nothing else."""

    weight: Any  # a Parameter
    bias: Any  # a Parameter, or None

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the function of the base's class for this weight and bias."""
        raise NotImplementedError

    def adapted_weight(self) -> Tensor:
        """Return the weight that merging bakes in, in float32 or wider."""
        return wide(self.weight)

    def adapted_bias(self) -> Tensor | None:
        """Return the bias that merging bakes in, in float32 or wider."""
        return None if self.bias is None else wide(self.bias)

    @torch.no_grad()
    def merged(self, base: nn.Module) -> nn.Module:
        """Return a module like `base` that computes what this layer does in eval mode.

        Raises:
            ValueError: the base's module has no bias to hold the adapter's.
        """
        weight, bias = self.adapted_weight(), self.adapted_bias()
        if (bias is None) != (self.bias is None):
            raise ValueError(
                f"{type(self).__name__} cannot be merged: the base's module has no bias to hold "
                "its shift; keep it, or eject it"
            )
        parameters = {"weight": nn.Parameter(weight.to(self.weight.dtype)), "bias": self.bias}
        if bias is not None and not torch.equal(bias, wide(self.bias)):
            parameters["bias"] = nn.Parameter(bias.to(self.bias.dtype))
        return with_parameters(base, parameters)


class AdapterLinear(AffineLayer, nn.Linear):
    """An `nn.Linear` whose weight (O, I) and bias (O,) are the base layer's Parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight x + bias (..., O) for x (..., I)."""
        return F.linear(x, weight, bias)

    def folds_update(self, x: Tensor) -> bool:
        """Return whether to multiply x (..., I) by W plus the update, rather than by each apart.

        It pays where the sum costs less than one more product with every token. It needs a frozen
        W and full precision. It is never done in an export, which must work for any number of
        tokens, nor in forward-mode differentiation, which `FoldedProduct` does not support.
        """
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() or x.is_meta:
            return False
        if torch.autograd.forward_ad._current_level >= 0:  # inside torch.func.jvp
            return False
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        if not keeps_small_updates(x) or x.dtype != self.weight.dtype or x.ndim < 2:
            return False
        return x.numel() > self.in_features * min(self.weight.shape)


class AdapterNorm(AffineLayer, nn.LayerNorm):
    """An `nn.LayerNorm` whose weight and bias (D,) are the base layer's Parameters."""

    def __init__(self, base: nn.LayerNorm) -> None:
        super().__init__(base.normalized_shape, base.eps, device="meta")
        self.weight, self.bias = base.weight, base.bias

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight times normalised x, plus bias, (..., D) for x (..., D)."""
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Wrapper(AdapterLayer):
    """A layer around a module of any class, of which it is an instance too.

    Make one by `around`. It shares the base's attributes and its dictionary of children, so a child
    that is replaced later is replaced in both. `super().forward` is the base's function.
    """

    adapted_name: str = ""  # of the module that it replaces, for messages

    @classmethod
    def around(cls, base: nn.Module) -> Self:
        """Return a layer that computes what `base` does, until it is given parameters.

        Raises:
            ValueError: the base has an attribute whose name the layer needs.
        """
        needed = ("enabled", *cls.__annotations__)
        if taken := [name for name in needed if hasattr(base, name)]:
            raise ValueError(
                f"{type(base).__name__} has an attribute {taken[0]!r}, which {cls.__name__} needs; "
                "rename it"
            )
        layer: Self = object.__new__(_mixed(cls, type(base)))
        vars(layer).update(vars(base))
        vars(layer)["_parameters"], vars(layer)["_buffers"] = {}, {}
        return layer

    def __reduce__(self) -> tuple[Any, ...]:  # pickle cannot find its class by name
        wrapper, base = type(self).__bases__
        return _unmixed, (wrapper, base), vars(self)


def _mixed(wrapper: type[W], base: type[nn.Module]) -> type[W]:
    """Return the one class of these wrappers around modules of the class `base`."""
    if (wrapper, base) not in _MIXED:
        names = {"__module__": wrapper.__module__, "__doc__": wrapper.__doc__}
        _MIXED[wrapper, base] = type(wrapper.__name__, (wrapper, base), names)
    return _MIXED[wrapper, base]


_MIXED: dict[tuple[type, type], Any] = {}


def _unmixed(wrapper: type[W], base: type[nn.Module]) -> W:
    """Return a wrapper without attributes, to be filled from a copy or a pickle."""
    return object.__new__(_mixed(wrapper, base))


def with_parameters(base: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """Return a module like `base`, of its class and with its attributes, with these parameters."""
    module = object.__new__(type(base))
    vars(module).update(vars(base))
    vars(module)["_parameters"] = {**base._parameters, **parameters}
    for name in ("_buffers", "_modules"):
        vars(module)[name] = copy.copy(vars(base)[name])
    return module
