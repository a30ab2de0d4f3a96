"""Layers of a bank: stacks of many adapters' terms, of which each row of a batch takes its own.

`adapters.many.terms` has the function. Smaller ranks are padded with zeros, smaller heads with
classes whose logit is -inf.
"""

import threading

import torch
from torch import Tensor

from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer
from adapters.many.rows import not_rows
from adapters.many.terms import linear, norm


class Ids(threading.local):
    """The slot of each row of a thread's batch; all layers of a bank read the same object."""

    # with a __dict__, a compiled pass loses what it writes here at a graph break
    __slots__ = ()
    rows: Tensor  # (B,)

    def __reduce__(self) -> tuple[type["Ids"], tuple[()]]:  # a copy starts without rows
        return Ids, ()


class Stack(AffineLayer):
    """A module that takes each row's terms from its slot; buffers (slots, ...) hold them."""

    ids: Ids
    name: str = ""  # of the module that it replaces, for messages

    def add(self, ids: Ids, n_slots: int, terms: dict[str, torch.Size]) -> None:
        """Allocate buffers for terms of these shapes; every slot holds the base's.

        Args:
            ids: which the layer reads in each pass.
            n_slots: first axis of the buffers.
            terms: the largest shape of each term, by its name.
        """
        self.ids = ids
        for name, shape in terms.items():
            start = self.weight.new_zeros(n_slots, *shape)
            if name in ("gain", "in_gain"):
                start += 1 if isinstance(self, AdapterLinear) else self.weight.detach()
            if name == "bias" and self.bias is not None:
                start += self.bias.detach()
            self.register_buffer(f"stack_{name}", start, persistent=False)

    def stacks(self) -> dict[str, Tensor]:
        """Return the stacks (slots, ...) by the names of the terms that they hold."""
        return {
            name.removeprefix("stack_"): stack
            for name, stack in self._buffers.items()
            if name.startswith("stack_") and stack is not None
        }

    def check(self, terms: dict[str, Tensor], name: str) -> None:
        """Check that these terms of the module called `name` are no larger than the stacks.

        Raises:
            ValueError: one is.
        """
        stacks = self.stacks()
        for key, term in terms.items():
            most = stacks[key].shape[1:] if key in stacks else term.shape[:0]
            if len(most) != term.ndim or any(n > m for n, m in zip(term.shape, most, strict=True)):
                raise ValueError(
                    f"the bank has no room for {key} {tuple(term.shape)} of {name!r}; make it with "
                    "such an adapter among its first, or with a larger rank or n_classes"
                )

    def fill(self, slot: int, terms: dict[str, Tensor]) -> None:
        """Set a slot to these terms, and to the base's where one is missing."""
        for key, stack in self.stacks().items():
            stack[slot].copy_(stack[0])
            if key in terms:
                stack[slot][tuple(slice(n) for n in terms[key].shape)].copy_(terms[key])

    def row_terms(self, x: Tensor) -> dict[str, Tensor]:
        """Return the terms of every row's adapter: a (B, R, I), b (B, O, R), others (B, 1, D).

        Raises:
            ValueError: x, which the layer sees, has not B rows.
        """
        if len(x) != len(self.ids.rows):
            raise not_rows(x, len(self.ids.rows), self.name)
        terms = {name: stack[self.ids.rows] for name, stack in self.stacks().items()}
        return {name: t if name in ("a", "b") else t[:, None] for name, t in terms.items()}


class StackedLinear(Stack, AdapterLinear):
    """y = gain (W (in_gain x) + B A x) + bias, from x (B, ..., I) to y (B, ..., O), row by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, ..., O) for x (B, ..., I)."""
        rows = x[:, None].flatten(1, -2)  # (B, N, I)
        y = linear(rows, self, self.row_terms(x))
        return y.view(*x.shape[:-1], self.out_features)


class StackedNorm(Stack, AdapterNorm):
    """y = gain normalised(x) + bias, (B, ..., D), row by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, ..., D) for x (B, ..., D), where D may be several axes."""
        rows = x[:, None].flatten(1, -1 - len(self.normalized_shape))  # (B, N, D)
        return norm(rows, self, self.row_terms(x)).view(x.shape)


class StackedHead(Stack, AdapterLinear):
    """Logits (B, ..., most classes) of features (B, ..., I); -inf beyond a row's classes."""

    def add(self, ids: Ids, n_slots: int, terms: dict[str, torch.Size]) -> None:
        """Allocate heads of these shapes; slot 0 holds the base's, the others give NaN."""
        self.ids = ids
        for name, shape in terms.items():
            stack = self.weight.new_full((n_slots, *shape), torch.nan)
            self.register_buffer(f"stack_{name}", stack, persistent=False)
        self.fill(0, {})

    def fill(self, slot: int, terms: dict[str, Tensor]) -> None:
        """Set a slot's head: these terms, or the base's."""
        weight, bias = terms.get("weight", self.weight), terms.get("bias", self.bias)
        stacks, n = self.stacks(), len(weight)
        stacks["weight"][slot], stacks["bias"][slot] = 0, -torch.inf
        stacks["weight"][slot, :n] = weight
        stacks["bias"][slot, :n] = 0 if bias is None else bias

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, ..., most classes) of features x (B, ..., I)."""
        terms, rows = self.row_terms(x), x[:, None].flatten(1, -2)  # (B, N, I)
        y = torch.baddbmm(terms["bias"], rows, terms["weight"][:, 0].mT)
        return y.view(*x.shape[:-1], y.shape[-1])
