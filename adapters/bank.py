"""Saved adapters and one base in, a model for mixed batches out: every image names its adapter.

A row of the batch is computed as its adapter alone would, in one pass for all rows: where x is of
adapter i, y = gain_i (W (in_gain_i x) + B_i A_i x) + bias_i. Ranks and heads of different size are
padded with zeros. Slot 0 is the base.

    bank = adapters.Bank(model, ["runs/signs", "runs/symbols"])
    logits = bank(images, ids)  # ids: 1 for signs, 2 for symbols, 0 for the base
"""

import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.base import plain, plain_linear
from adapters.inject import adapter_layer, injection, shared_copy
from adapters.io import load_adapter
from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer

Slot = dict[str, dict[str, Tensor]]  # an adapter's parts by the name of a module and of a part


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


class Bank(nn.Module):
    """One base and any number of saved adapters, each of a batch's rows with its own.

    Threads may ask it side by side, but not while one of them loads an adapter.
    LoRA, DoRA, VeRA, (IA)^3, SSF, BitFit and norm tuning can be stacked, in any mixture.

    Args:
        model: the base, which stays what it is; the bank's weights lie in the same memory.
        folders: saved adapters, for slots 1, 2, ...; they also tell what room the bank needs.
        n_slots: room for adapters, at least as many as folders, and the base.
        rank: room for the ranks of low-rank updates, at least the folders'.
        n_classes: room for classes, at least the folders' and the base's.
        head: name of the module that gives logits (B, n_classes).

    Attributes:
        classes: the class names of every slot, () for those that are empty.

    Raises:
        FileNotFoundError, ValueError: as for `load_adapter`, or a folder can't be stacked.
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Sequence[str | os.PathLike[str]],
        *,
        n_slots: int | None = None,
        rank: int = 0,
        n_classes: int = 0,
        head: str = "head",
    ) -> None:
        super().__init__()
        self.base: nn.Module
        vars(self)["base"] = model  # not a child: self.model has its weights
        self.model = shared_copy(model).requires_grad_(False).eval()
        self.head, self.ids = head, Ids()
        self.n_slots = max(n_slots or 0, len(folders) + 1)
        self.classes: list[tuple[str, ...]] = [()] * self.n_slots
        self.classes[0] = getattr(model, "classes", ())
        loaded = [self._read(folder) for folder in folders]
        rooms: dict[str, dict[str, torch.Size]] = {}
        for slot, _ in loaded:
            for name, parts in slot.items():
                for key, part in parts.items():
                    shape = rooms.setdefault(name, {}).get(key, part.shape)
                    size = torch.Size(max(n) for n in zip(shape, part.shape, strict=True))
                    rooms[name][key] = size
        own = plain_linear(self.model.get_submodule(head), head)
        most = rooms.get(head, {}).get("weight", own.weight.shape)[0]
        most = max(most, own.out_features, n_classes)
        rooms[head] = {"weight": torch.Size([most, own.in_features]), "bias": torch.Size([most])}
        for name, room in rooms.items():
            self._stack(name, room, rank)
        for i, (slot, classes) in enumerate(loaded, start=1):
            self._put(i, slot, classes)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return logits (B, most classes) of images (B, ...), a row by the adapter in slot `ids`.

        Where a row's adapter has fewer classes, its last logits are -inf.

        Args:
            images: what the base takes.
            ids: (B,) slots, integers.
        """
        self.ids.rows = ids
        logits: Tensor = self.model(images)
        return logits

    def load(self, slot: int, folder: str | os.PathLike[str]) -> None:
        """Put a saved adapter into a slot, or another into its place; nothing is recompiled.

        Raises:
            FileNotFoundError, ValueError: as for `load_adapter`; there is no such slot, or no room
                for its parts, rank or classes. The slot then holds what it held.
        """
        if not 1 <= slot < self.n_slots:
            raise ValueError(f"{slot=} is not in 1 <= slot < {self.n_slots}; 0 is the base")
        self._put(slot, *self._read(folder))

    def _stack(self, name: str, parts: dict[str, torch.Size], rank: int) -> None:
        """Put a stack with room for these parts in the place of a module."""
        base = plain(self.model.get_submodule(name), name, nn.Linear, nn.LayerNorm)
        if isinstance(base, nn.Linear):
            stack: Stack = StackedHead(base) if name == self.head else StackedLinear(base)
        else:
            assert isinstance(base, nn.LayerNorm)
            stack = StackedNorm(base)
        if "a" in parts and rank > parts["a"][0]:
            parts |= {"a": torch.Size([rank, parts["a"][1]])}
            parts |= {"b": torch.Size([parts["b"][0], rank])}
        if "gain" in parts and base.bias is not None:  # the bias stands outside the gain
            parts |= {"bias": base.bias.shape}
        stack.add(self.ids, self.n_slots, parts)
        self.model.set_submodule(name, stack.eval())

    def _read(self, folder: str | os.PathLike[str]) -> tuple[Slot, tuple[str, ...]]:
        """Return an adapter's parts, by module, and its classes, all checked by `load_adapter`."""
        adapted = load_adapter(shared_copy(self.base), folder)
        record = injection(adapted)
        if others := sorted(record.trained.keys() - {self.head}):
            raise ValueError(f"{folder}: {others[0]!r} trained too; a bank stacks only the head")
        slot = {name: adapter_layer(adapted, name).parts() for name in record.adapted}
        if self.head in record.trained:
            head = plain_linear(adapted.get_submodule(self.head), self.head)
            slot[self.head] = {"weight": head.weight} | (
                {} if head.bias is None else {"bias": head.bias}
            )
        classes = tuple(getattr(adapted, "classes", ()))
        if len(classes) != len(slot.get(self.head, {}).get("weight", classes)):
            classes = tuple(str(i) for i in range(len(slot[self.head]["weight"])))  # PEFT's
        return slot, classes

    @torch.no_grad()
    def _put(self, i: int, slot: Slot, classes: tuple[str, ...]) -> None:
        stacks = {n: m for n, m in self.model.named_modules() if isinstance(m, Stack)}
        if missing := sorted(slot.keys() - stacks.keys()):
            raise ValueError(
                f"the bank has no room for {missing[0]!r}; make it with that adapter among its "
                "first"
            )
        for name, stack in stacks.items():  # all fits before anything is changed
            stack.check(slot.get(name, {}), name)
        for name, stack in stacks.items():
            stack.fill(i, slot.get(name, {}))
        self.classes[i] = classes
