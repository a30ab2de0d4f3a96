"""K adapted copies of one base in, one model out that computes, and trains, all of them at once.

The batch holds a part of equal size for each, one after the other. A linear that they adapt makes
one batched product, with W + scale B A of each, so K adapters cost K times the base's operations
but only one pass; see `adapters.layers.AdapterLayer.parts` for the function of a layer. What trains
are the copies' own Parameters: each can be saved, merged and used by itself.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import plain, plain_linear
from adapters.inject import injection, shared_copy
from adapters.layers import AdapterLayer, is_exact

Model = TypeVar("Model", bound=nn.Module)


def _products(x: Tensor, weights: Tensor) -> Tensor:
    """Return x (K, T, I) times weights (K, I, O), one for each; on a CPU faster than as a batch."""
    if x.device.type != "cpu":
        return torch.bmm(x, weights)
    y = x.new_empty(*x.shape[:2], weights.shape[2])
    for i, weight in enumerate(weights):
        torch.mm(x[i], weight, out=y[i])
    return y


class SummedProducts(torch.autograd.Function):
    """y = x (W + B A)^T for each of K; backward no gradient of W, as in `adapters.methods.lora`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight, a, b)
        return _products(x, torch.baddbmm(weight.expand(len(a), -1, -1), b, a).mT)  # (K, T, O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, a, b = ctx.saved_tensors  # (K, T, I), (O, I), (K, R, I), (K, O, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _products(grad, torch.baddbmm(weight.expand(len(a), -1, -1), b, a))
        grad_a = torch.bmm(torch.bmm(b.mT, grad.mT), x)  # (K, R, T) (K, T, I)
        grad_b = torch.bmm(torch.bmm(a, x.mT), grad).mT  # ((K, R, T) (K, T, O))^T
        return grad_x, None, grad_a, grad_b


class Joint(nn.Module):
    """A linear or norm of K adapted copies: x (K * T, ..., I) -> (K * T, ..., O), T rows each."""

    base: Any  # an nn.Linear or nn.LayerNorm
    members: list[nn.Module]

    def __init__(self, base: nn.Linear | nn.LayerNorm, members: Sequence[nn.Module]) -> None:
        super().__init__()
        vars(self)["base"], vars(self)["members"] = base, [*members]  # theirs, not its children

    def forward(self, x: Tensor) -> Tensor:
        """Return what each member makes of its rows."""
        parts = [m.parts() if isinstance(m, AdapterLayer) else {} for m in self.members]
        y = x.reshape(len(parts), -1, x.shape[-1])  # (K, T, I)
        gain, bias, in_gain = (self._stacked(parts, key) for key in ("gain", "bias", "in_gain"))
        y = y if in_gain is None else in_gain * y
        y = self._product(y, parts) if isinstance(self.base, nn.Linear) else self._norm(y)
        y = y if gain is None else gain * y
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], -1)

    def _stacked(self, parts: list[dict[str, Tensor]], key: str) -> Tensor | None:
        """Return a part of all members (K, 1, D), the base's where one has none; None if unused."""
        weight, bias = self.base.weight, self.base.bias
        own: dict[str, Tensor | None] = {"gain": weight, "bias": bias, "in_gain": None}
        if isinstance(self.base, nn.Linear):
            own = {"gain": None, "bias": bias, "in_gain": None}
        if not any(key in part for part in parts):
            return own[key]
        first = next(part[key] for part in parts if key in part)
        neutral = torch.zeros_like(first) if key == "bias" else torch.ones_like(first)
        default = own.get(key)
        default = neutral if default is None else default
        return torch.stack([part.get(key, default) for part in parts])[:, None]

    def _product(self, x: Tensor, parts: list[dict[str, Tensor]]) -> Tensor:
        rank = max(len(part["a"]) if "a" in part else 0 for part in parts)
        weight = self.base.weight
        if not rank:
            return F.linear(x, weight)
        empty = {"a": weight.new_zeros(0, weight.shape[1]), "b": weight.new_zeros(len(weight), 0)}
        pairs = [(part.get("a", empty["a"]), part.get("b", empty["b"])) for part in parts]
        a = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])  # (K, R, I)
        b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b in pairs])  # (K, O, R)
        if not is_exact(x):
            return F.linear(x, weight) + torch.bmm(torch.bmm(x, a.mT), b.mT)
        return cast(Tensor, SummedProducts.apply(x, weight, a, b))  # type: ignore[no-untyped-call]

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.base.normalized_shape, None, None, self.base.eps)


class JointHead(nn.Module):
    """The heads of K copies: features (K * T, I) -> logits (K * T, n_classes)."""

    members: list[nn.Linear]

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__()
        vars(self)["members"] = [*members]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, each member's by its head."""
        weight = torch.stack([head.weight for head in self.members])  # (K, O, I)
        y = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.mT)
        if self.members[0].bias is not None:
            y = y + torch.stack([head.bias for head in self.members])[:, None]
        return y.flatten(0, 1)


def together(base: Model, members: Sequence[nn.Module], head: str = "head") -> Model:
    """Return a model that computes all `members`, adapted copies of `base`, in one pass.

    It takes their batches, of equal size, one after the other (K * T, ...), and gives their logits
    in the same order. Their Parameters train through it.

    Args:
        base: what they were adapted from; stays what it is.
        members: adapted copies of it, with heads of one width.
        head: name of the module that trains in all of them.

    Raises:
        ValueError: a method can't be stacked, has dropout, or something besides the head trains.
    """
    joint = shared_copy(base).requires_grad_(False)
    records = [injection(member) for member in members]
    for record in records:
        if record.trained.keys() != {head}:
            raise ValueError(f"{[*record.trained]} train besides the adapter; only {head!r} may")
        if getattr(record.config, "dropout", 0):
            raise ValueError("dropout draws other numbers together than alone; leave it out")
    for name in sorted({name for record in records for name in record.adapted}):
        module = plain(joint.get_submodule(name), name, nn.Linear, nn.LayerNorm)
        assert isinstance(module, nn.Linear | nn.LayerNorm)
        own = [member.get_submodule(name) for member in members]
        for layer, record in zip(own, records, strict=True):
            if name in record.adapted:
                cast(AdapterLayer, layer).parts()  # says now if it can't be stacked
        joint.set_submodule(name, Joint(module, own))
    heads = [plain_linear(member.get_submodule(head), head) for member in members]
    joint.set_submodule(head, JointHead(heads))
    return joint.train(members[0].training)
