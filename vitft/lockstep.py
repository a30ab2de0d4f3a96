"""Several training runs at once: their batches go through one model, each has all else its own.

Every run computes what it computes alone: it draws its own random numbers, clips its own gradients,
and writes its own files. Only dropout in the base is drawn for all of them together.
"""

import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from vitft.images import Images
from vitft.model import VisionTransformer
from vitft.train import Fit, Interrupted, stop_signals


class Lockstep:
    """Runs with equal plans but for their learning rates and seeds, on sets of equal size.

    Args:
        fits: the runs.
        joint: a model of their batches (K * B, ...), one after the other, to logits in that order,
            through which their parameters train.
        draws: the state of the random numbers that each run begins with.
    """

    def __init__(
        self, fits: Sequence[Fit], joint: VisionTransformer, draws: Sequence[torch.Tensor]
    ):
        self.fits, self.joint, self.draws = [*fits], joint, [*draws]

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
        for i, fit in enumerate(self.fits):
            fit.restore()
            self.draws[i] = torch.get_rng_state()
        places = {(fit.epoch, fit.step) for fit in self.fits}
        if len(places) > 1:
            raise ValueError("the runs were stopped at different steps; start with --overwrite")

    def _save(self) -> None:
        for fit, draws in zip(self.fits, self.draws, strict=True):
            torch.set_rng_state(draws)
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
        batches = [f.train.batches(f.order(), f.plan.batch_size, f.device) for f in self.fits]
        for pairs in zip(*batches, strict=True):
            self._train_step(pairs)
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

    def _train_step(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        inputs, targets = [], []
        for i, (fit, pair) in enumerate(zip(self.fits, pairs, strict=True)):
            torch.set_rng_state(self.draws[i])
            prepared = fit.prepare(*pair)
            self.draws[i] = torch.get_rng_state()
            inputs.append(prepared[0])
            targets.append(prepared[1])
        first = self.fits[0]
        with torch.autocast(first.device.type, torch.bfloat16, enabled=first.plan.bf16):
            logits = self.joint(torch.cat(inputs)).chunk(len(self.fits))
        self.draws[-1] = torch.get_rng_state()  # goes on after what the base's dropout drew
        losses = [f.loss(y, t) for f, y, t in zip(self.fits, logits, targets, strict=True)]
        torch.stack(losses).sum().backward()
        for fit in self.fits:
            fit.update()
