"""A layer's function with K adapters, as in a bank or joint training: x of each in, y of each out.

y = gain (W (in_gain x) + B A x) + bias for a linear, y = gain normalised(x) + bias for a norm. W is
the base's for all K, and so is a term that an adapter lacks. `T` is the number of tokens of each.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.layers import keeps_small_updates

Terms = Mapping[str, Tensor]  # a (K, R, I), b (K, O, R); gain, in_gain, bias (K, 1, D)


def products(x: Tensor, weights: Tensor) -> Tensor:
    """Return x (K, T, I) times weights (K, I, O); on a CPU one by one, faster than as a batch."""
    if x.device.type != "cpu" or torch.is_grad_enabled():  # autograd refuses out=
        return torch.bmm(x, weights)
    y = x.new_empty(*x.shape[:2], weights.shape[2])
    for i, weight in enumerate(weights):
        torch.mm(x[i], weight, out=y[i])
    return y


class FoldedProducts(torch.autograd.Function):
    """y = x (W + B A)^T for each of K, as in `adapters.methods.lora`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return y (K, T, O) for x (K, T, I), W (O, I), A (K, R, I) and B (K, O, R)."""
        return products(x, torch.baddbmm(weight.expand(len(a), -1, -1), b, a).mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save x (K, T, I), W (O, I), A (K, R, I) and B (K, O, R)."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, A and B for that of y (K, T, O)."""
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = products(grad, torch.baddbmm(weight.expand(len(a), -1, -1), b, a))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(grad.mT, x).sum(dim=0)
        grad_a = torch.bmm(torch.bmm(b.mT, grad.mT), x)  # (K, R, T) (K, T, I)
        grad_b = torch.bmm(torch.bmm(a, x.mT), grad).mT  # ((K, R, T) (K, T, O))^T
        return grad_x, grad_weight, grad_a, grad_b


# torch asks for it at each call, and to work it out takes as long as a small product
FoldedProducts.forward.__signature__ = signature(FoldedProducts.forward)  # type: ignore[attr-defined]


def linear(x: Tensor, base: nn.Linear, terms: Terms, *, fold: bool = False) -> Tensor:
    """Return gain (W (in_gain x) + B A x) + bias, (K, T, O) for x (K, T, I).

    Args:
        x: each adapter's input.
        base: holds W, and the bias where the terms have none.
        terms: each adapter's, stacked.
        fold: multiply x by W + B A where its precision allows; faster with many tokens.
    """
    bias_last = "gain" in terms or "bias" in terms  # a gain does not scale the bias
    bias: Tensor | None = None if bias_last else base.bias
    x = scaled(x, terms.get("in_gain"))
    if "a" not in terms:
        y = F.linear(x, base.weight, bias)
    elif fold and keeps_small_updates(x):
        y = FoldedProducts.apply(x, base.weight, terms["a"], terms["b"])  # type: ignore[no-untyped-call]
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, base.weight, bias)
        hidden = torch.bmm(x, terms["a"].mT.to(x.dtype)).to(y.dtype)  # (K, T, R)
        # in place, since another tensor of this size costs a third of the time
        y = y.baddbmm_(hidden, terms["b"].mT.to(y.dtype))
    y = scaled(y, terms.get("gain"))
    bias = terms.get("bias", base.bias) if bias_last else None
    return y if bias is None else y + bias.to(y.dtype)


def norm(x: Tensor, base: nn.LayerNorm, terms: Terms) -> Tensor:
    """Return gain normalised(x) + bias, (K, ..., D) for x (K, ..., D)."""
    y = F.layer_norm(x, base.normalized_shape, None, None, base.eps)
    y = scaled(y, terms.get("gain", base.weight))
    bias = terms.get("bias", base.bias)
    return y if bias is None else y + bias.to(y.dtype)


def scaled(x: Tensor, gain: Tensor | None) -> Tensor:
    """Return gain times x in the dtype of x, or x where there is no gain."""
    return x if gain is None else gain.to(x.dtype) * x
