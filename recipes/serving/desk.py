"""Pictures and names of adapters in; classes and probabilities out, many requests in one pass."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import adapters
from recipes.serving.jobs import Job, Jobs
from recipes.shared.classifier import MAX_ROWS, Classes, best_of
from vitft.devices.cores import in_parts
from vitft.evaluation.evaluate import suitable_batch
from vitft.evaluation.rollout import MAX_TOKENS, n_tokens, rollout
from vitft.evaluation.task import TASKS
from vitft.hub import fetched
from vitft.model.vit import VisionTransformer
from vitft.pictures.preprocess import Fit

BASE = "base"  # the name of the base's own head


class Desk:
    """Answers pictures by one base and its adapters, many pictures in one forward pass.

    A thread takes all waiting pictures, up to `MAX_ROWS` pairs of picture and adapter, into one
    pass. Adapters are read from disk meanwhile, and put into the bank between two passes.

    Args:
        base: answers too, under the name BASE, if its head is trained or there is no adapter.
        folders: saved adapters, or their names on the hub, by name.
        max_adapters: how many there may be.
        max_waiting: pictures that may wait; more are refused.
        rank: largest rank of adapters that are loaded later.
        n_classes: most classes of adapters that are loaded later.

    Raises:
        ValueError, OSError: an adapter is missing, broken, or can't be stacked with the others.
    """

    def __init__(
        self,
        base: VisionTransformer,
        folders: Mapping[str, str],
        *,
        device: torch.device,
        max_adapters: int = 64,
        max_waiting: int = 256,
        rank: int = 16,
        n_classes: int = 0,
    ) -> None:
        if BASE in folders:
            raise ValueError(f"an adapter can't be called {BASE!r}, as the base is")
        self.bank = adapters.Bank(
            base,
            [fetched(folder) for folder in folders.values()],
            n_slots=max(max_adapters, len(folders)) + 1,
            rank=rank,
            n_classes=n_classes,
        )
        if self.bank.preprocessing is None:  # without adapters; later ones must then fit the base
            self.bank.preprocessing = base.preprocessing
        base.preprocessing = self.bank.preprocessing
        self.base, self.fit, self.device = base, Fit.of(base), device
        self.bank.to(device)
        self.slots = {name: i for i, name in enumerate(folders, start=1)}
        if base.has_head or not folders:
            self.slots[BASE] = 0
        self.folders = dict(folders)
        self.can_attend = n_tokens(base) <= MAX_TOKENS  # whether attention can be asked for
        self.pass_lock, self.load_lock = threading.Lock(), threading.Lock()
        max_rows = max(1, min(MAX_ROWS, suitable_batch(base)))
        self.jobs = Jobs(self._answer, max_rows=max_rows, max_waiting=max_waiting)

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self.jobs.close()

    def chosen(self, texts: Sequence[str]) -> list[str]:
        """Return adapters' names without repetition; those of all adapters where none is given.

        Args:
            texts: a name each, or several with commas. A name may hold commas itself, as those of
                a sweep's folders do.

        Raises:
            ValueError: there is no adapter of a name.
        """
        known = dict(self.slots)
        parts = [[text] if text in known else text.split(",") for text in texts]
        names = [name.strip() for name in chain(*parts) if name.strip()]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(known)}")
        return [*dict.fromkeys(names)] or [*known]

    def ask(
        self, image: Tensor, names: Sequence[str], *, attention: bool = False
    ) -> "Future[Tensor]":
        """Return the future answer to a picture: probabilities (n_names, most classes).

        With `attention`, it is the attention to its patches (n_names, rows, columns), see
        `rollout`.

        Raises:
            Busy: too many pictures wait.
        """
        job = Job(image, [self.slots[name] for name in names], attention)
        self.jobs.put(job)
        return job.answer

    def named(self, probabilities: Tensor, names: Sequence[str], top: int) -> dict[str, Classes]:
        """Return the `top` most probable classes by each adapter's name.

        Args:
            probabilities: the answer of `ask` (n_names, most classes).
            names: of the adapters that were asked.
            top: number of classes.
        """
        classes = [self.bank.classes[self.slots[name]] for name in names]
        rows = zip(names, probabilities, classes, strict=True)
        return {name: best_of(row, known, top) for name, row, known in rows}

    def load(self, name: str, folder: str) -> None:
        """Load an adapter, or replace the one of that name; pictures are answered meanwhile.

        Raises:
            ValueError, OSError: it is missing, broken, or does not fit; or every slot is taken.
        """
        if name == BASE or not name or not name.isprintable():
            raise ValueError(f"an adapter can't be called {name!r}")
        with self.load_lock:
            used = {*self.slots.values()}
            free = [i for i in range(1, self.bank.n_slots) if i not in used]
            slot = self.slots.get(name) or (free[0] if free else 0)
            if not slot:
                raise ValueError(f"there is no room beside {len(used)} adapters; replace one")
            found = self.bank.read(fetched(folder))
            with self.pass_lock:
                self.bank.put(slot, found)
            self.slots[name], self.folders[name] = slot, folder

    def listing(self) -> list[dict[str, Any]]:
        """Return name, classes and folder of every adapter."""
        classes, folders = self.bank.classes, self.folders
        return [
            {"name": name, "classes": list(classes[slot]), "folder": folders.get(name)}
            for name, slot in [*self.slots.items()]
        ]

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Set the answers of jobs; runs in the thread of `Jobs`."""
        with self.pass_lock:
            self._classify([job for job in jobs if not job.attention])
            for job in jobs:
                if job.attention:
                    maps = [self._attention(job.image, slot) for slot in job.slots]
                    job.answer.set_result(torch.stack(maps))

    def _classify(self, jobs: Sequence[Job]) -> None:
        """Set the answers of jobs that ask for classes, in one pass."""
        if not jobs:
            return
        images = torch.stack([job.image for job in jobs for _ in job.slots])
        ids = torch.tensor([slot for job in jobs for slot in job.slots])
        found = in_parts(self._part, images.to(self.device), ids.to(self.device)).cpu()
        for job, rows in zip(jobs, found.split([len(job.slots) for job in jobs]), strict=True):
            job.answer.set_result(rows)

    def _attention(self, image: Tensor, slot: int) -> Tensor:
        """Return one adapter's attention (rows, columns) to the patches of an image."""
        assert isinstance(self.bank.model, VisionTransformer)
        self.bank.ids.rows = torch.tensor([slot], device=self.device)
        return rollout(self.bank.model, image)

    @torch.inference_mode()
    def _part(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return probabilities (b, most classes) of pixels (b, C, h, w) by the slots `ids` (b,)."""
        logits: Tensor = self.bank(self.base.normalize(images), ids)
        return TASKS[self.base.labels]().predict(logits.float())
