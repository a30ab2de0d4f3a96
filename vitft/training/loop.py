"""The one training loop: runs in, one or several; trained models and their metrics out.

The order of a run: its state is saved; the features of frozen stages are computed once, where the
plan says so; the head starts from a linear probe, where the plan says so. Then come epochs of
steps, each followed by a validation and a line of metrics.jsonl.
"""

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from vitft.bars import note, progress_bar
from vitft.devices.memory import peak_bytes
from vitft.devices.processes import highest, is_first, n_processes
from vitft.devices.spread import copy_into
from vitft.evaluation.features import extract, n_frozen
from vitft.evaluation.probe import Probe, fit_probe
from vitft.optimizers.updates import NotFinite
from vitft.pictures.images import Images
from vitft.training.draws import random_state, set_random_state
from vitft.training.epochs import finish_epoch, validate_start
from vitft.training.gradients import Join
from vitft.training.progress import epoch_line, frozen_line, show
from vitft.training.run import Run
from vitft.training.saving import confirm, save
from vitft.training.step import Step
from vitft.training.stop import Interrupted, stop_signals

logger = logging.getLogger("vitft")  # shown with --verbose
SHOW_SECONDS = 0.5  # between updates of the loss in the progress bar, which wait for the device


def train(runs: Run | Sequence[Run], join: Join | None = None) -> dict[Run, str]:
    """Train to the end; return the runs that failed, with the reason.

    The failure of a single run is an error. Of several, a run that fails is left out while the
    others go on. Afterwards the models have their trained weights, but the modes and image size
    that they had before; the global random state is restored, too.

    Args:
        runs: one run, or several whose plans differ in learning rates and seed only, on training
            sets of equal size, at the same epoch and step.
        join: makes one model of several runs' models, see `Step`; not needed for one run.

    Raises:
        Interrupted: after SIGINT or SIGTERM, with every state saved.
        ValueError: a trainable parameter gets no gradient, or the runs cannot train together.
        NotFinite: a gradient, loss or weight of every run is not finite; the last finite state
            stays saved.
    """
    loop = Loop([runs] if isinstance(runs, Run) else runs, join)
    with _left_as_they_were(loop.runs):
        loop.run()
    return loop.failed


class Loop:
    """The runs that train, and what they share: a step, signals, a progress bar, a clock.

    Attributes:
        failed: the runs that failed, with the reason.
        saved: when the states were last saved, by `time.perf_counter`.
    """

    def __init__(self, runs: Sequence[Run], join: Join | None) -> None:
        self.runs, self.join = [*runs], join
        self.failed: dict[Run, str] = {}
        self.saved = time.perf_counter()
        check_runs(self.runs, join)

    def run(self) -> None:
        """Train every run to its end."""
        plan = self.runs[0].plan
        for run in self.runs:
            save(run)
        if plan.n_cached and self.runs[0].epoch < plan.epochs:
            self._extract()
        if plan.probe_head and self.runs[0].epoch == self.runs[0].step == 0:
            self._start_heads()
        self.step = self._make_step()
        with stop_signals() as stop, self._bar() as bar:
            while not self.step.runs[0].is_done():
                self._run_epoch(stop, bar)
                self._finish_epoch()
            self._save()
            for run in self.step.runs:
                run.use_kept_weights()
            (stopped,) = highest([sum(stop[:1])])
            if stopped:  # during the last validation, when everything had been trained and saved
                raise Interrupted(stopped)

    def _extract(self) -> None:
        """Compute the features of the frozen stages, once for every set of images."""
        n = min(min(run.plan.n_cached, n_frozen(run.model)) for run in self.runs)
        extracted: dict[int, list[Images]] = {}
        for run in self.runs if n else ():
            started, images = time.perf_counter(), (run.train, run.validation)
            if id(run.train) not in extracted:
                extracted[id(run.train)] = [
                    extract(run.model, some, n, folder=run.folder, bf16=run.plan.bf16)
                    for some in images
                ]
                synchronize(run.device)
                run.feature_seconds = time.perf_counter() - started
            run.inputs, run.validation_inputs = extracted[id(run.train)]

    def _start_heads(self) -> None:
        """Give the heads the weights of a linear probe, one for all runs on the same images.

        One is enough: runs that train together start from the same model, since a new adapter
        changes nothing.
        """
        found: dict[int, Probe] = {}
        for run in self.runs:
            key, task, bf16 = id(run.train), run.plan.task, run.plan.bf16
            if key not in found:
                started, images = time.perf_counter(), (run.inputs, run.validation_inputs)
                found[key] = fit_probe(run.model, *images, task, folder=run.folder, bf16=bf16)
                run.feature_seconds += time.perf_counter() - started
                if found[key].figures:
                    note(frozen_line(found[key].figures))
            run.frozen = found[key].figures
            with torch.no_grad():
                for parameter, value in zip(
                    run.model.head.parameters(), found[key].head, strict=True
                ):
                    copy_into(parameter, value)
            validate_start(run)

    def _run_epoch(self, stop: list[int], bar: "tqdm[Any]") -> None:
        """Take the steps that are left of an epoch; save after `save_seconds`, and on a signal."""
        step, first, n = self.step, self.step.runs[0], len(self.step.runs)
        size = first.plan.image_size(first.epoch, first.image_size)
        for model in (*step.backward.models, *(run.model for run in step.runs)):
            model.train().resize(size)
        shown = started = time.perf_counter()
        before = first.seconds * n
        shares = first.shares()
        sets = [run.batches(shares) for run in step.leaders]
        for rows, *batches in zip(shares, *sets, strict=True):
            step(batches, rows)
            now = time.perf_counter()
            for run in step.runs:
                run.step += 1
                run.seconds = (before + now - started) / n  # a step's time is shared by n runs
            bar.update(rows.n)
            if now - shown > max(SHOW_SECONDS, bar.mininterval):
                shown = now
                show(first, bar)
            is_due = is_first() and now - self.saved > first.plan.save_seconds > 0
            stopped, due = highest([sum(stop[:1]), int(is_due)])  # by any process
            if stopped or due:
                self._save()
                started += self.saved - now  # saving does not count as training time
            if stopped:
                raise Interrupted(stopped)
        synchronize(first.device)
        for run in step.runs:
            run.seconds = (before + time.perf_counter() - started) / n

    def _finish_epoch(self) -> None:
        """Finish every run's epoch; runs that failed are left out of the next one."""
        for run in self.step.runs:
            try:
                if run in self.step.failed:
                    raise self.step.failed[run]
                name = "" if len(self.runs) == 1 else f"{run.folder.name}  "
                note(name + epoch_line(finish_epoch(run)))
                peak = round((peak_bytes(run.device) or 0) / 1e6)
                logger.debug("%speak memory %s MB", name, peak)
            except NotFinite as error:
                self._leave_out(run, error)
        if self.failed.keys() & self.step.runs:
            self.step.share_draws()
            self.step = self._make_step()

    def _save(self) -> None:
        """Save every run that has not failed.

        Several runs are saved all or none, since they must resume at the same step: each writes a
        second file, which replaces the first only once all are written.
        """
        self.step.share_draws()
        name = uuid.uuid4().hex if len(self.step.runs) > 1 else None
        for run in self.step.runs:
            try:
                if run not in self.step.failed:
                    save(run, name)
            except NotFinite as error:
                self.step.failed[run] = error
                if len(self.step.failed) == len(self.step.runs):
                    raise
        for run in self.step.runs if name else ():
            if run not in self.step.failed:
                confirm(run)
        self.saved = time.perf_counter()

    def _leave_out(self, run: Run, error: NotFinite) -> None:
        """Note that a run has failed.

        Raises:
            NotFinite: it was the last one.
        """
        if len(self.failed) + 1 == len(self.runs):
            raise error
        self.failed[run] = str(error)

    def _make_step(self) -> Step:
        runs = [run for run in self.runs if run not in self.failed]
        return Step(runs, self.join or (lambda models: models[0]))

    def _bar(self) -> "tqdm[Any]":
        """Return a progress bar that counts a run's images."""
        run, n = self.runs[0], len(self.runs[0].train)
        done = run.epoch * n + run.step * run.plan.batch_size
        return progress_bar(run.plan.epochs * n, initial=done)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that the clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _left_as_they_were(runs: Sequence[Run]) -> Iterator[None]:
    """Restore the models' modes and sizes, the runs' inputs and the random state afterwards.

    Gradients that the parameters have before are dropped, and so are those of an unfinished step.
    """
    draws = random_state(runs[0].device)
    modes = [(module, module.training) for run in runs for module in run.model.modules()]
    sizes = [(run.model, run.model.image_size) for run in runs]
    for run in runs:
        run.updates.drop_gradients()
    try:
        yield
    finally:
        set_random_state(draws, runs[0].device)
        for run in runs:
            run.updates.drop_gradients()
            run.inputs, run.validation_inputs = run.train, run.validation
        for module, mode in modes:
            module.training = mode
        for model, size in sizes:
            model.resize(size)


def check_runs(runs: Sequence[Run], join: Join | None = None) -> None:
    """Check that one run, or several together, can take their steps.

    Raises:
        ValueError: they cannot.
    """
    if not runs:
        raise ValueError("there is no run to train")
    for run in runs:
        run.updates.check_same(run.model)
    if n_processes() > 1 and runs[0].plan.auto_accumulate:
        raise ValueError(
            "auto_batch is for one process; with several, choose --accumulate yourself"
        )
    if len(runs) == 1:
        return
    if n_processes() > 1:
        raise ValueError(f"{len(runs)} runs train together in one process, not in {n_processes()}")
    if join is None:
        raise ValueError(f"{len(runs)} runs need join, which makes one model of theirs")
    first = runs[0].plan
    if first.compiled or first.recorded or first.checkpoint_blocks or first.patience:
        raise ValueError(
            "several runs cannot train compiled, recorded, with checkpoint_blocks or with patience"
        )
    for run in runs:
        same = replace(run.plan, lr=first.lr, seed=first.seed, lr_factors=first.lr_factors)
        if same != first:
            raise ValueError("plans of runs that train together may differ in lr and seed only")
        if (run.epoch, run.step, len(run.train)) != (
            runs[0].epoch,
            runs[0].step,
            len(runs[0].train),
        ):
            raise ValueError("runs that train together must be at one step, on sets of equal size")
