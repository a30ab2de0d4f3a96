"""One training step: batches in; every run's parameters updated by the gradient of its batch.

Several runs take their steps through one joint model. Each computes what it would compute by
itself: runs have separate random numbers, gradient clipping and losses. Only dropout in the base is
drawn for all of them together.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from vitft.devices.graphs import Recorded
from vitft.devices.shares import Rows
from vitft.optimizers.updates import NotFinite
from vitft.training.draws import random_state, set_random_state, varies
from vitft.training.forward import prepare
from vitft.training.gradients import Alone, Join, Together
from vitft.training.run import Run


class Step:
    """A step of runs whose plans differ in learning rate and seed only, all at the same step.

    Runs of the same seed on the same images have the same batches: the first of them, their leader,
    prepares each batch for all.

    Args:
        runs: one run, or several on sets of equal size.
        join: makes one model of those of n runs. It takes their concatenated batches (n * B, ...)
            and returns their logits (n * B, n_classes) in the same order.

    Attributes:
        failed: the runs whose gradient was not finite, and the error; the others go on.
        leaders: the first run of each group with the same batches.
        set_of: for each run the index of its leader in `leaders`.
        stage: the stage that the runs' inputs go into.
        backward: leaves the gradients of the batches in the runs' parameters.
    """

    def __init__(self, runs: Sequence[Run], join: Join) -> None:
        first = runs[0]
        self.runs, self.is_single, self.stage = [*runs], len(runs) == 1, first.inputs.stage
        self.failed: dict[Run, NotFinite] = {}
        keys = [(id(run.train), run.plan.seed) for run in runs]
        sets = list(dict.fromkeys(keys))
        self.set_of = [sets.index(key) for key in keys]
        self.leaders = [runs[keys.index(key)] for key in sets]
        is_random = varies(first.model)
        self.backward: Alone | Together
        if self.is_single:
            self.backward = Alone(first, self.stage, is_random=is_random)
        else:
            self.backward = Together(self.runs, self.set_of, join, self.stage, is_random=is_random)
        self.prepare, self.learn = prepare, self._learn
        if first.plan.compiled:
            self.prepare = torch.compile(prepare, dynamic=False)
        if first.plan.recorded:
            self.learn = Recorded(self._learn)
        if self.is_single:
            set_random_state(first.draws, first.device)

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], rows: Rows | None = None) -> None:
        """Update every run's parameters by the gradient of its batch.

        Args:
            batches: for every leader, images as they are held (b, ...) and labels (b, ...).
            rows: which images of the batch these are; by default all.
        """
        self.rows = rows = rows or Rows(len(batches[0][1]))
        prepared: list[tuple[Tensor, Tensor]] = []
        for run, batch in zip(self.leaders, batches, strict=True):
            if not self.is_single:
                set_random_state(run.draws, run.device)
            prepared.append(self.prepare(run, *batch, rows, stage=self.stage))
            if not self.is_single:
                run.draws = random_state(run.device)
        for run in self.runs:
            run.updates.set_lr(run.lr(run.step))
        self.learn(*chain(*prepared))
        for run in self.runs:
            if run not in self.failed:
                run.average.update(run.epoch * run.steps_per_epoch + run.step)
        if not self.is_single:  # the base's dropout has drawn from the last leader's random state
            self.leaders[-1].draws = random_state(self.leaders[-1].device)

    def share_draws(self) -> None:
        """Give every run the random state of its leader, so that it can be saved."""
        if self.is_single:
            self.runs[0].draws = random_state(self.runs[0].device)
        for run, i in zip(self.runs, self.set_of, strict=True):
            run.draws = self.leaders[i].draws

    def _learn(self, *prepared: Tensor) -> None:
        """Compute gradients and update the parameters.

        Args:
            prepared: for every leader, the input and the targets that `prepare` returned.
        """
        before = [run.totals.clone() for run in self.runs if run.plan.on_nan == "skip"]
        self.backward(prepared[::2], prepared[1::2], self.rows)
        for i, run in enumerate(self.runs):
            if self._update(run):
                run.totals.copy_(before[i])

    def _update(self, run: Run) -> bool:
        """Update a run's parameters, unless it has failed.

        Returns:
            Whether its step was skipped.

        Raises:
            NotFinite: this run has failed, and so has every other.
        """
        if run in self.failed:
            return False
        try:
            return run.update()
        except NotFinite as error:
            self.failed[run] = error
            if len(self.failed) == len(self.runs):
                raise
            return False
