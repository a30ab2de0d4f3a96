"""Layers of a bank: the parts of many adapters in, stacked; each row computed with its own.

Where x is of adapter i, y = gain_i (W (in_gain_i x) + B_i A_i x) + bias_i. Ranks and heads of
different size are padded with zeros.
"""

import threading

import torch
from torch import Tensor

from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer


class Ids(threading.local):
    """Which slot every row of a thread's batch is of; one object that all layers of a bank read."""

    __slots__ = ()  # so that what a compiled pass writes at a graph break is kept
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

    def part(self, name: str, x: Tensor) -> Tensor | None:
        """Return a part for every row, to be multiplied with x (B, ..., D); None if unused."""
        stack = self._buffers.get(f"stack_{name}")
        if stack is None:
            return None
        rows = stack[self.ids.rows]  # (B, D)
        return rows.view(len(rows), *[1] * (x.ndim - 2), rows.shape[-1])


class StackedLinear(Stack, AdapterLinear):
    """y = gain (W (in_gain x) + B A x) + bias, from x (B, ..., I) to y (B, ..., O), row by row."""

    def adapted(self, x: Tensor) -> Tensor:
        """Return y (B, ..., O) for x (B, ..., I)."""
        in_gain, gain, bias = (self.part(name, x) for name in ("in_gain", "gain", "bias"))
        y = self.compute(
            x if in_gain is None else in_gain * x, self.weight, self.bias if bias is None else None
        )
        a, b = self._buffers.get("stack_a"), self._buffers.get("stack_b")
        if a is not None and b is not None:
            rows, tokens = self.ids.rows, x[:, None].flatten(1, -2)  # (B, N, I)
            hidden = torch.bmm(tokens, a[rows].mT).to(y.dtype)  # (B, N, R)
            b = b[rows].mT.to(y.dtype)  # (B, R, O)
            # in place: another tensor as large as y costs a third of this
            y = y[:, None].flatten(1, -2).baddbmm_(hidden, b).view(y.shape)
        y = y if gain is None else gain * y
        return y if bias is None else y + bias


class StackedNorm(Stack, AdapterNorm):
    """y = gain normalised(x) + bias, (B, ..., D), row by row."""

    def adapted(self, x: Tensor) -> Tensor:
        """Return y (B, ..., D) for x (B, ..., D)."""
        gain, bias = self.part("gain", x), self.part("bias", x)
        y = self.compute(x, torch.ones_like(self.weight), None)
        y = (self.weight if gain is None else gain) * y
        bias = self.bias if bias is None else bias
        return y if bias is None else y + bias


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

    def adapted(self, x: Tensor) -> Tensor:
        """Return logits (B, most classes) of features x (B, I)."""
        weight, bias = (self.rooms()[name][self.ids.rows] for name in ("weight", "bias"))
        return torch.baddbmm(bias[:, None], x[:, None], weight.mT)[:, 0]
