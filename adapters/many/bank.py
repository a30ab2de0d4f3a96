"""Saved adapters and one base in, a model for mixed batches out: each image has its own adapter.

One pass computes all rows of a batch, each as its adapter alone would. Slot 0 is the base.

    bank = adapters.Bank(model, ["runs/signs", "runs/symbols"])
    logits = bank(images, ids)  # ids: 1 for signs, 2 for symbols, 0 for the base
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.folder import read_adapter
from adapters.identity import fingerprint, shared_copy
from adapters.io import load_adapter
from adapters.many.rows import refuse_tokens_first
from adapters.many.stacks import Ids, Stack, StackedHead, StackedLinear, StackedNorm
from adapters.plain import plain, plain_linear
from adapters.record import adapter_layer, injection

Slot = dict[str, dict[str, Tensor]]  # an adapter's terms, by names of module and term


class Bank(nn.Module):
    """One base and any number of saved adapters; each row of a batch has its own adapter.

    LoRA, DoRA, VeRA, (IA)^3, SSF, BitFit and norm tuning can be stacked, in any mixture. Threads
    may call a bank at the same time, but not while one of them loads an adapter.

    Args:
        model: the base, which is not changed; the bank shares its memory.
        folders: saved adapters, for slots 1, 2, ...; they set the shapes that the bank can hold.
        n_slots: number of slots, the base's included; at least one more than folders.
        rank: largest rank that a slot can hold; at least the folders'.
        n_classes: most classes that a slot can hold; at least the folders' and the base's.
        head: name of the module whose output is the logits (B, n_classes).

    Attributes:
        classes: the class names of each slot, () for empty ones.
        preprocessing: the adapters' record of how images are prepared; None if none has one.

    Raises:
        FileNotFoundError, ValueError: as for `load_adapter`, a folder can't be stacked, or a module
            has batch_first=False.
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
        refuse_tokens_first(model)
        if head not in dict(model.named_modules()):
            raise ValueError(f"the model has no {head!r}; give as head what gives the logits")
        self.fingerprint = fingerprint(model, exclude=(head,))
        self.model = shared_copy(model).requires_grad_(False).eval()
        self.head, self.ids = head, Ids()
        self.n_slots = max(n_slots or 0, len(folders) + 1)
        self.classes: list[tuple[str, ...]] = [()] * self.n_slots
        self.classes[0] = getattr(model, "classes", ())
        self.preprocessing: Any = None
        loaded = [self.read(folder) for folder in folders]
        if self.preprocessing is not None:
            object.__setattr__(self.model, "preprocessing", self.preprocessing)
        shapes: dict[str, dict[str, torch.Size]] = {}  # the largest, by module and term
        for slot, _ in loaded:
            for name, terms in slot.items():
                for key, term in terms.items():
                    shape = shapes.setdefault(name, {}).get(key, term.shape)
                    size = torch.Size(max(n) for n in zip(shape, term.shape, strict=True))
                    shapes[name][key] = size
        base = plain_linear(self.model.get_submodule(head), head)
        most = shapes.get(head, {}).get("weight", base.weight.shape)[0]
        most = max(most, base.out_features, n_classes)
        shapes[head] = {"weight": torch.Size([most, base.in_features]), "bias": torch.Size([most])}
        for name, largest in shapes.items():
            self._stack(name, largest, rank)
        for i, (slot, classes) in enumerate(loaded, start=1):
            self.put(i, (slot, classes))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return logits (B, most classes) of images (B, ...), each row by the adapter of its slot.

        Where a row's adapter has fewer classes, its last logits are -inf.

        Args:
            images: the base's input.
            ids: (B,) slots, int64 or int32.

        Raises:
            ValueError: `ids` are not an integer for each image, or, if they are on a CPU, where the
                check waits for no device, one is no slot; or an adapted layer sees another first
                axis than that of images.
        """
        if not torch.compiler.is_compiling():
            self._check(ids, len(images))
        self.ids.rows = ids
        logits: Tensor = self.model(images)
        return logits

    def _check(self, ids: Tensor, n: int) -> None:
        """Check that ids are slots, one for each of n images.

        Raises:
            ValueError: they are not.
        """
        if ids.shape != (n,) or ids.dtype not in (torch.int32, torch.int64):
            given = f"{tuple(ids.shape)} of {ids.dtype}"
            raise ValueError(f"ids are {given}; give an int64 for each of the {n} images")
        if ids.device.type == "cpu" and n and not 0 <= ids.min() <= ids.max() < self.n_slots:
            raise ValueError(f"ids={ids.tolist()} are not all in 0 <= id < {self.n_slots}")

    def load(self, slot: int, folder: str | os.PathLike[str]) -> None:
        """Put a saved adapter into a slot, in place of what it holds; nothing is recompiled.

        Raises:
            FileNotFoundError, ValueError: as for `load_adapter`; there is no such slot, or no room
                for its terms, rank or classes. The slot is then unchanged.
        """
        if not 1 <= slot < self.n_slots:
            raise ValueError(f"{slot=} is not in 1 <= slot < {self.n_slots}; 0 is the base")
        self.put(slot, self.read(folder))

    def _stack(self, name: str, terms: dict[str, torch.Size], rank: int) -> None:
        """Replace a module by a stack for terms of these shapes."""
        base = plain(self.model.get_submodule(name), name, nn.Linear, nn.LayerNorm)
        if isinstance(base, nn.Linear):
            stack: Stack = StackedHead(base) if name == self.head else StackedLinear(base)
        else:
            assert isinstance(base, nn.LayerNorm)
            stack = StackedNorm(base)
        if "a" in terms and rank > terms["a"][0]:
            terms |= {"a": torch.Size([rank, terms["a"][1]])}
            terms |= {"b": torch.Size([terms["b"][0], rank])}
        stack.name = name
        stack.add(self.ids, self.n_slots, terms)
        self.model.set_submodule(name, stack.eval())

    def read(self, folder: str | os.PathLike[str]) -> tuple[Slot, tuple[str, ...]]:
        """Return an adapter for `put`: its terms by module, and its classes, all checked.

        Other threads may call the bank meanwhile.

        Raises:
            FileNotFoundError, ValueError: as for `load_adapter`, or it can't be stacked.
        """
        known = self.fingerprint if read_adapter(folder).trained == (self.head,) else None
        adapted = load_adapter(shared_copy(self.base), folder, fingerprint=known)
        record = injection(adapted)
        preprocessing = getattr(adapted, "preprocessing", None)
        if preprocessing != (self.preprocessing or preprocessing):
            raise ValueError(
                f"{folder} takes images prepared as {preprocessing}, not {self.preprocessing}"
            )
        self.preprocessing = preprocessing
        if others := sorted(record.trained.keys() - {self.head}):
            raise ValueError(f"{folder}: {others[0]!r} trained too; a bank stacks only the head")
        slot = {name: adapter_layer(adapted, name).terms() for name in record.adapted}
        if self.head in record.trained:
            head = plain_linear(adapted.get_submodule(self.head), self.head)
            slot[self.head] = {"weight": head.weight} | (
                {} if head.bias is None else {"bias": head.bias}
            )
        classes = tuple(getattr(adapted, "classes", ()))
        if len(classes) != len(slot.get(self.head, {}).get("weight", classes)):
            # PEFT saves no class names
            classes = tuple(str(i) for i in range(len(slot[self.head]["weight"])))
        return slot, classes

    @torch.no_grad()
    def put(self, i: int, read: tuple[Slot, tuple[str, ...]]) -> None:
        """Put what `read` returned into slot `i`; no thread may call the bank meanwhile.

        Raises:
            ValueError: there is no room for its terms, rank or classes; the slot is then unchanged.
        """
        slot, classes = read
        stacks = {n: m for n, m in self.model.named_modules() if isinstance(m, Stack)}
        if missing := sorted(slot.keys() - stacks.keys()):
            raise ValueError(
                f"the bank has no room for {missing[0]!r}; make it with that adapter among its "
                "first"
            )
        for name, stack in stacks.items():  # first, so that an error changes nothing
            stack.check(slot.get(name, {}), name)
        for name, stack in stacks.items():
            stack.fill(i, slot.get(name, {}))
        self.classes[i] = classes
