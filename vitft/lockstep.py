"""Several training runs at once: their batches go through one model, each has all else its own.

Every run computes what it computes alone: it draws its own random numbers, clips its own gradients,
and writes its own files. Only dropout in the base is drawn for all of them together.
"""

import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitft.features import n_frozen
from vitft.images import Images
from vitft.model import VisionTransformer
from vitft.train import Fit, Interrupted, stop_signals


class Lockstep:
    """Runs with equal plans but for their learning rates and seeds, on sets of equal size.

    Runs of one seed on one set see the same images; what is frozen computes them once.

    Args:
        fits: the runs.
        joint: a model of their batches (K * B, ...), one after the other, to logits in that order,
            through which their parameters train.
    """

    def __init__(self, fits: Sequence[Fit], joint: VisionTransformer) -> None:
        self.fits, self.joint = [*fits], joint
        same = [(id(fit.train), fit.plan.seed) for fit in fits]
        self.sets = list(dict.fromkeys(same))
        self.set_of = torch.tensor([self.sets.index(key) for key in same], device=fits[0].device)
        self.leaders = [fits[same.index(key)] for key in self.sets]  # they draw for their set
        self.draws = [torch.Generator().manual_seed(seed).get_state() for _, seed in self.sets]
        self.n_shared = min(n_frozen(fit.model) for fit in fits) if len(fits) > 1 else 0

    def run(self) -> None:
        """Run them all to the end.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with every state saved.
            ValueError: a loss is no longer finite.
        """
        first, *_ = self.fits
        self._save()
        self._cache()
        with stop_signals() as stop, first.bar() as bar:
            while first.epoch < first.plan.epochs:
                self._run_epoch(stop, bar)
                for fit in self.fits:
                    fit.finish_epoch(bar)
            for fit in self.fits:
                fit.model.first = 0
            self._save()
            if stop:
                raise Interrupted(f"stopped by {signal.Signals(stop[0]).name}")

    def restore(self) -> None:
        """Go back to the states that were saved last.

        Raises:
            FileNotFoundError: nothing was saved.
            ValueError: a state is broken, or they were not saved together.
        """
        for fit, i in zip(self.fits, self.set_of.tolist(), strict=True):
            fit.restore()
            self.draws[i] = torch.get_rng_state()
        places = {(fit.epoch, fit.step) for fit in self.fits}
        if len(places) > 1:
            raise ValueError("the runs were stopped at different steps; start with --overwrite")

    def _save(self) -> None:
        for fit, i in zip(self.fits, self.set_of.tolist(), strict=True):
            torch.set_rng_state(self.draws[i])
            fit.save()

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
            self.joint.first = fit.model.first

    def _run_epoch(self, stop: list[int], bar: "tqdm[Any]") -> None:
        self.joint.train()
        first, n = self.fits[0], len(self.fits)
        started = saved = time.perf_counter()
        before = first.seconds * n
        batches = [f.train.batches(f.order(), f.plan.batch_size, f.device) for f in self.leaders]
        for pairs in zip(*batches, strict=True):
            self.train_step(pairs)
            now = time.perf_counter()
            for fit in self.fits:
                fit.step += 1
                fit.seconds = (before + now - started) / n  # its share
            bar.update(len(pairs[0][1]))
            if stop or now - saved > first.plan.save_seconds > 0:
                self._save()
                saved = time.perf_counter()
                started += saved - now
            if stop:
                raise Interrupted(f"stopped by {signal.Signals(stop[0]).name}")
        first.synchronize()

    def train_step(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Move every run's parameters by the gradient of its batch, in one pass.

        Args:
            pairs: images and labels (B,) of every set.
        """
        inputs, targets = [], []
        for i, (fit, pair) in enumerate(zip(self.leaders, pairs, strict=True)):
            torch.set_rng_state(self.draws[i])
            prepared = fit.prepare(*pair)
            self.draws[i] = torch.get_rng_state()
            inputs.append(prepared[0])
            targets.append(prepared[1])
        first = self.fits[0]
        with torch.autocast(first.device.type, torch.bfloat16, enabled=first.plan.bf16):
            logits = self._forward(torch.stack(inputs)).chunk(len(self.fits))
        self.draws[-1] = torch.get_rng_state()  # goes on after what the base's dropout drew
        losses = [
            fit.loss(y, targets[i])
            for fit, y, i in zip(self.fits, logits, self.set_of.tolist(), strict=True)
        ]
        torch.stack(losses).sum().backward()
        for fit in self.fits:
            fit.update()

    def _forward(self, x: Tensor) -> Tensor:
        """Return logits (K * B, n_classes) for the inputs of every set (n_sets, B, ...)."""
        start = self.joint.first
        shared = max(start, self.n_shared)
        with torch.no_grad():
            y = self.joint.run(x.flatten(0, 1), start, shared).unflatten(0, x.shape[:2])
        return self.joint.run(y[self.set_of].flatten(0, 1), shared)
