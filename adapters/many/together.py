"""K adapted copies of one base in, one model out that computes and trains all of them at once.

A batch holds the rows of one copy, or member, after another, equally many for each. An adapted
linear is one batched product with W + scale B A of each member, so that K adapters cost K times the
base's operations but only one pass; `AdapterLayer.terms` has a layer's function. The members'
Parameters train, so each member can be saved, merged and used by itself.
"""

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.identity import base_fingerprint, fingerprint, shared_copy
from adapters.layers import AdapterLayer
from adapters.many.rows import Rows, refuse_tokens_first
from adapters.many.terms import linear, norm
from adapters.plain import plain, plain_linear
from adapters.record import injection, unwrapped

Model = TypeVar("Model", bound=nn.Module)


class Joint(nn.Module):
    """A linear or norm of K members: each member's rows are computed with its terms.

    Args:
        base: the base's module.
        members: the K members' modules of that name: adapter layers, or the base's.
        rows: of the pass.
        name: of the module, for messages.
    """

    members: list[nn.Module]

    def __init__(
        self,
        base: nn.Linear | nn.LayerNorm,
        members: Sequence[nn.Module],
        rows: Rows,
        name: str,
    ) -> None:
        super().__init__()
        self.base, self.rows, self.name = base, rows, name
        vars(self)["members"] = [*members]  # not children: their Parameters are the members'

    def forward(self, x: Tensor) -> Tensor:
        """Return y (K * B, ..., O) for x (K * B, ..., I), each member's rows by its terms.

        Raises:
            ValueError: the members have not equally many rows, or the first axis is another.
        """
        self.rows.check(x, self.name)
        if len(x) % len(self.members):
            raise ValueError(
                f"{len(x)} rows are not equally many for {len(self.members)} members; give them "
                "batches of one size, and a base whose first axis is that of images"
            )
        each = [m.terms() if isinstance(m, AdapterLayer) else {} for m in self.members]
        terms = {key: self._stacked(each, key) for key in sorted({key for t in each for key in t})}
        axes = x.shape[-1:] if isinstance(self.base, nn.Linear) else self.base.normalized_shape
        rows = x.reshape(len(each), -1, *axes)  # (K, T, I)
        if isinstance(self.base, nn.Linear):
            y = linear(rows, self.base, terms, fold=True)
            return y.view(*x.shape[:-1], self.base.out_features)
        return norm(rows, self.base, terms).view(x.shape)

    def _stacked(self, each: Sequence[dict[str, Tensor]], key: str) -> Tensor:
        """Return one term of all members (K, ...), the base's where a member has none."""
        first = next(terms[key] for terms in each if key in terms)
        if key in ("a", "b"):  # smaller ranks, or none, are padded with zeros
            rank = max(terms[key].shape[key == "b"] for terms in each if key in terms)
            none = first.new_zeros((0, first.shape[1]) if key == "a" else (len(first), 0))
            factors = [terms.get(key, none) for terms in each]
            if key == "a":
                return torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in factors])
            return torch.stack([F.pad(b, (0, rank - b.shape[1])) for b in factors])
        default = torch.zeros_like(first) if key == "bias" else torch.ones_like(first)
        if key == "bias" and self.base.bias is not None:
            default = self.base.bias.to(first.dtype)
        if key == "gain" and isinstance(self.base, nn.LayerNorm):
            default = self.base.weight.to(first.dtype)
        return torch.stack([terms.get(key, default) for terms in each])[:, None]


class JointHead(nn.Module):
    """The heads of K members, of one width; `rows` and `name` as for `Joint`."""

    members: list[nn.Linear]

    def __init__(self, members: Sequence[nn.Linear], rows: Rows, name: str) -> None:
        super().__init__()
        self.rows, self.name = rows, name
        vars(self)["members"] = [*members]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (K * B, ..., O) of features x (K * B, ..., I), each member's by its head.

        Raises:
            ValueError: the first axis is not that of rows.
        """
        self.rows.check(x, self.name)
        weight = torch.stack([head.weight for head in self.members])  # (K, O, I)
        y = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.mT)
        if self.members[0].bias is not None:
            y = y + torch.stack([head.bias for head in self.members])[:, None]
        return y.view(*x.shape[:-1], y.shape[-1])


def refuse_other_base(base: nn.Module, members: Sequence[nn.Module], head: str) -> None:
    """Check that the members were adapted from this base.

    A member that lies in the base's memory was; the weights of others are compared by fingerprints.

    Raises:
        ValueError: one was adapted from another base.
    """
    state = {n: t for n, t in base.state_dict().items() if isinstance(t, Tensor)}
    own = {n: t.data_ptr() for n, t in state.items() if not n.startswith(f"{head}.")}
    expected = None
    for i, member in enumerate(members):
        theirs = unwrapped(member).state_dict()
        if all(n in theirs and theirs[n].data_ptr() == memory for n, memory in own.items()):
            continue
        expected = expected or fingerprint(base, exclude=(head,))
        if (found := base_fingerprint(member)) != expected:
            raise ValueError(
                f"member {i} was adapted from the base {found}, but this one is {expected}; "
                "take copies of this base, such as shared_copy makes"
            )


def together(base: Model, members: Sequence[nn.Module], head: str = "head") -> Model:
    """Return a model that computes all `members`, adapted copies of `base`, in one pass.

    It takes their batches, of equal size, one after another (K * B, ...), and returns their logits
    in the same order. A backward pass gives the members' Parameters their gradients.

    Args:
        base: what the members were adapted from; not changed.
        members: adapted copies of it, with heads of one width, all with a bias or all without.
        head: name of the module that trains in all of them.

    Raises:
        ValueError: a method can't be stacked, has dropout, something besides the head trains, the
            heads are not alike, a member was adapted from another base, or a module of the base has
            batch_first=False.
    """
    refuse_tokens_first(base)
    joint = shared_copy(base).requires_grad_(False)
    records, rows = [injection(member) for member in members], Rows()
    for record in records:
        if record.trained.keys() != {head}:
            raise ValueError(f"{[*record.trained]} train besides the adapter; only {head!r} may")
        if getattr(record.config, "dropout", 0):
            raise ValueError("dropout draws other numbers together than alone; leave it out")
    refuse_other_base(base, members, head)
    for name in sorted({name for record in records for name in record.adapted}):
        module = plain(joint.get_submodule(name), name, nn.Linear, nn.LayerNorm)
        assert isinstance(module, nn.Linear | nn.LayerNorm)
        layers = [member.get_submodule(name) for member in members]
        for layer, record in zip(layers, records, strict=True):
            if name in record.adapted:
                cast(AdapterLayer, layer).terms()  # raises now if it can't be stacked
        joint.set_submodule(name, Joint(module, layers, rows, name))
    heads = [plain_linear(member.get_submodule(head), head) for member in members]
    if len(kinds := {(tuple(one.weight.shape), one.bias is not None) for one in heads}) > 1:
        raise ValueError(
            f"the members have heads {head!r} of unlike shapes or biases: "
            + ", ".join(f"{shape}{' with bias' * bias}" for shape, bias in sorted(kinds))
        )
    joint.set_submodule(head, JointHead(heads, rows, head))
    rows.watch(joint)
    return joint.train(members[0].training)
