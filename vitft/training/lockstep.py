"""Several training runs at once: their batches go through one model, each has all else its own.

Every run computes what it computes alone: it draws its own random numbers, clips its own gradients,
and writes its own files. Only dropout in the base is drawn for all of them together.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitft.data.images import Images
from vitft.model.vit import VisionTransformer
from vitft.training.cores import each, in_parts, n_parts, stays_whole
from vitft.training.features import n_frozen
from vitft.training.loop import Fit
from vitft.training.state import STATE, random_state, set_random_state
from vitft.training.stop import Interrupted, stop_signals


class Lockstep:
    """Runs with equal plans but for their learning rates and seeds, at the same place in them.

    Runs of one seed on one set see the same images; what is frozen computes them once.

    Args:
        fits: the runs, on sets of equal size.
        join: makes of their models one of their batches (K * B, ...), one after the other, to
            logits in that order, through which their parameters train.

    Attributes:
        failed: why a run was left out, by its place in `fits`, such as a loss that is not finite.
    """

    def __init__(
        self, fits: Sequence[Fit], join: Callable[[list[VisionTransformer]], VisionTransformer]
    ) -> None:
        self.all, self.join = [*fits], join
        self.failed: dict[int, str] = {}
        self.images = [(fit.train, fit.validation) for fit in fits]
        self._gather()

    def _gather(self) -> None:
        """Join the runs that have not failed."""
        self.fits = [fit for i, fit in enumerate(self.all) if i not in self.failed]
        if not self.fits:
            raise ValueError(next(iter(self.failed.values())))
        same = [(id(fit.train), fit.plan.seed) for fit in self.fits]
        sets = list(dict.fromkeys(same))
        self.set_of = [sets.index(key) for key in same]
        self.leaders = [self.fits[same.index(key)] for key in sets]  # they draw for their set
        self.n_shared = min(n_frozen(fit.model) for fit in self.fits) if len(self.fits) > 1 else 0
        self.groups = self._groups()
        self.joints = [self.join([self.fits[i].model for i in group]) for group in self.groups]

    def _groups(self) -> list[range]:
        """Return which runs go through the model in one pass: all, or as many as suit the cores."""
        n, first = len(self.fits), self.fits[0]
        n_groups = min(n, n_parts(first.model, n * first.plan.batch_size))
        bounds = [n * i // n_groups for i in range(n_groups + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    def run(self) -> None:
        """Run them all to the end; one that fails is left out, and noted in `failed`.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with every state saved.
            ValueError: all have failed.
        """
        first = self.fits[0]
        self._save()
        self._cache()
        with stop_signals() as stop, first.bar() as bar:
            while self.fits[0].epoch < first.plan.epochs:
                self._run_epoch(stop, bar)
                self._finish_epoch(bar)
            for fit, (train, validation) in zip(self.all, self.images, strict=True):
                fit.model.first, fit.train, fit.validation = 0, train, validation
            self._save()
            if stop:
                raise Interrupted(stop[0])

    def _finish_epoch(self, bar: "tqdm[Any]") -> None:
        n_failed = len(self.failed)
        for i, fit in enumerate(self.all):
            if i not in self.failed:
                try:
                    fit.finish_epoch(bar, f"{fit.folder.name}  ")
                except ValueError as error:
                    self.failed[i] = str(error)
                    (fit.folder / STATE).unlink(missing_ok=True)  # nothing to go on from
        if len(self.failed) > n_failed:
            self._share_draws()
            self._gather()

    def _share_draws(self) -> None:
        """Let every run know the random state of its set, whose leader may be left out."""
        for fit, i in zip(self.fits, self.set_of, strict=True):
            fit.draws = self.leaders[i].draws

    def _save(self) -> None:
        self._share_draws()
        for fit in self.fits:
            set_random_state(fit.draws, fit.device)
            fit.save()
        self.saved = time.perf_counter()

    def _cache(self) -> None:
        """Let the frozen stages see every set of images once."""
        done: dict[int, tuple[Images, Images]] = {}
        for fit in self.fits:
            images = id(fit.train)
            if images in done:
                fit.train, fit.validation = done[images]
                fit.model.first = fit.plan.n_cached
            else:
                fit.cache()
                done[images] = fit.train, fit.validation

    def _run_epoch(self, stop: list[int], bar: "tqdm[Any]") -> None:
        for joint in self.joints:
            joint.train()
        first, n = self.fits[0], len(self.fits)
        started = time.perf_counter()
        before = first.seconds * n
        batches = [f.train.batches(f.order(), f.plan.batch_size, f.device) for f in self.leaders]
        for pairs in zip(*batches, strict=True):
            self.train_step(pairs)
            now = time.perf_counter()
            for fit in self.fits:
                fit.step += 1
                fit.seconds = (before + now - started) / n  # its share
            bar.update(len(pairs[0][1]))
            if stop or now - self.saved > first.plan.save_seconds > 0:
                self._save()
                started += self.saved - now
            if stop:
                raise Interrupted(stop[0])
        first.synchronize()

    def train_step(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Move every run's parameters by the gradient of its batch, in one pass.

        Args:
            pairs: images and labels (B,) of every set.
        """
        inputs, targets = [], []
        for fit, pair in zip(self.leaders, pairs, strict=True):
            set_random_state(fit.draws, fit.device)
            prepared = fit.prepare(*pair)
            fit.draws = random_state(fit.device)
            inputs.append(self._frozen(prepared[0]))
            targets.append(prepared[1])
        learn = partial(self._learn, inputs, targets)
        groups = zip(self.groups, self.joints, strict=True)
        list(each(learn, groups, in_turn=stays_whole(self.joints[0])))
        # goes on after what the base's dropout drew
        self.leaders[-1].draws = random_state(self.fits[0].device)
        for fit in self.fits:
            fit.set_lr()
            fit.update()

    def _frozen(self, images: Tensor) -> Tensor:
        """Return what the stages that all runs share, and none trains, make of a set's images."""

        def part(x: Tensor) -> Tensor:
            with torch.no_grad(), self._autocast():
                return self.joints[0].run(x, self.fits[0].model.first, self._shared)

        return in_parts(part, self.joints[0], images)

    def _learn(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        group: range,
        joint: VisionTransformer,
    ) -> None:
        """Give the runs of a group the gradients of their sets' batches, in one pass."""
        with self._autocast():
            x = torch.cat([inputs[self.set_of[i]] for i in group])
            logits = joint.run(x, self._shared).chunk(len(group))
        losses = []
        for i, y in zip(group, logits, strict=True):
            loss, sums = self.fits[i].loss(y, targets[self.set_of[i]])
            self.fits[i].sums += sums
            losses.append(loss)
        torch.stack(losses).sum().backward()

    @property
    def _shared(self) -> int:
        """The first stage that is not the same for all runs."""
        return max(self.fits[0].model.first, self.n_shared)

    def _autocast(self) -> torch.autocast:
        first = self.fits[0]
        return torch.autocast(first.device.type, torch.bfloat16, enabled=first.plan.bf16)
