"""Layers of a bank: the parts of many adapters in, stacked; each row computed with its own.

`adapters.many.parts` has the function. Ranks and heads of different size are padded with zeros.
"""

import threading

import torch
from torch import Tensor

from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer
from adapters.many.parts import linear, norm


class Ids(threading.local):
    """Which slot every row of a thread's batch is of; one object that all layers of a bank read."""

    # with a __dict__, a compiled pass loses what it writes here at a graph break
    __slots__ = ()
    rows: Tensor  # (B,)

    def __reduce__(self) -> tuple[type["Ids"], tuple[()]]:  # a copy starts without rows
        return Ids, ()


class Stack(AffineLayer):
    """A module whose parts are those of each row's slot; stacks of (slots, ...) hold them."""

    ids: Ids

    def add(self, ids: Ids, n_slots: int, parts: dict[str, torch.Size]) -> None:
        """Make room for parts of these shapes, which are the base's in every slot."""
        self.ids = ids
        for name, shape in parts.items():
            start = self.weight.new_zeros(n_slots, *shape)
            if name in ("gain", "in_gain"):
                start += 1 if isinstance(self, AdapterLinear) else self.weight.detach()
            if name == "bias" and self.bias is not None:
                start += self.bias.detach()
            self.register_buffer(f"stack_{name}", start, persistent=False)

    def rooms(self) -> dict[str, Tensor]:
        """Return the stacks (slots, ...) by the names of the parts that they hold."""
        return {
            k[6:]: stack
            for k, stack in self._buffers.items()
            if k[:6] == "stack_" and stack is not None
        }

    def check(self, parts: dict[str, Tensor], name: str) -> None:
        """Check that there is room for these parts of the module called `name`.

        Raises:
            ValueError: there is not.
        """
        rooms = self.rooms()
        for key, part in parts.items():
            room = rooms[key].shape[1:] if key in rooms else part.shape[:0]
            if len(room) != part.ndim or any(n > m for n, m in zip(part.shape, room, strict=True)):
                raise ValueError(
                    f"the bank has no room for {key} {tuple(part.shape)} of {name!r}; make it with "
                    "such an adapter among its first, or with a larger rank or n_classes"
                )

    def fill(self, slot: int, parts: dict[str, Tensor]) -> None:
        """Set what a slot holds: these parts, and the base's where one is missing."""
        for key, stack in self.rooms().items():
            stack[slot].copy_(stack[0])
            if key in parts:
                stack[slot][tuple(slice(n) for n in parts[key].shape)].copy_(parts[key])

    def row_parts(self) -> dict[str, Tensor]:
        """Return the parts of every row's adapter: a (B, R, I), b (B, O, R), others (B, 1, D)."""
        parts = {name: stack[self.ids.rows] for name, stack in self.rooms().items()}
        return {name: p if name in ("a", "b") else p[:, None] for name, p in parts.items()}


class StackedLinear(Stack, AdapterLinear):
    """y = gain (W (in_gain x) + B A x) + bias, from x (B, ..., I) to y (B, ..., O), row by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, ..., O) for x (B, ..., I)."""
        rows = x[:, None].flatten(1, -2)  # (B, N, I)
        y = linear(rows, self, self.row_parts())
        return y.view(*x.shape[:-1], self.out_features)


class StackedNorm(Stack, AdapterNorm):
    """y = gain normalised(x) + bias, (B, ..., D), row by row."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, ..., D) for x (B, ..., D)."""
        rows = x[:, None].flatten(1, -2)  # (B, N, D)
        return norm(rows, self, self.row_parts()).view(x.shape)


class StackedHead(Stack, AdapterLinear):
    """Logits (B, most classes) of features (B, I); where a row has no more classes, -inf."""

    def add(self, ids: Ids, n_slots: int, parts: dict[str, torch.Size]) -> None:
        """Make room for heads of these shapes; slot 0 holds the base's, the others give NaN."""
        self.ids = ids
        for name, shape in parts.items():
            room = self.weight.new_full((n_slots, *shape), torch.nan)
            self.register_buffer(f"stack_{name}", room, persistent=False)
        self.fill(0, {})

    def fill(self, slot: int, parts: dict[str, Tensor]) -> None:
        """Set a slot's head: these parts, or the base's."""
        weight, bias = parts.get("weight", self.weight), parts.get("bias", self.bias)
        rooms, n = self.rooms(), len(weight)
        rooms["weight"][slot], rooms["bias"][slot] = 0, -torch.inf
        rooms["weight"][slot, :n] = weight
        rooms["bias"][slot, :n] = 0 if bias is None else bias

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, most classes) of features x (B, I)."""
        weight, bias = (self.rooms()[name][self.ids.rows] for name in ("weight", "bias"))
        return torch.baddbmm(bias[:, None], x[:, None], weight.mT)[:, 0]
