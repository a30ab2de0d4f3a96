"""A training run: a model, its images, a plan and a folder in; its batches and updates out.

A run holds its progress. `vitft.training.saving` saves it, `vitft.training.loop` takes its steps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitft.devices.shares import Rows
from vitft.model.vit import VisionTransformer
from vitft.optimizers.average import Average, put
from vitft.optimizers.build import lr_factor
from vitft.optimizers.updates import Updates
from vitft.pictures.images import Images
from vitft.training.best import Best
from vitft.training.draws import seeded_state, varies
from vitft.training.finite import check_steps
from vitft.training.plan import Plan


class Run:
    """A model in training: its optimizers, its images and its progress.

    Args:
        model: the model to train, on its device.
        train, validation: images; `validation` may be empty.
        plan: how to train.
        folder: for the state and metrics.jsonl.
        belongs: what else must be the same when the run is resumed, such as the base's fingerprint.
        options: those of the command line, which the state keeps.

    Attributes:
        image_size: full side of the images, in pixels.
        inputs, validation_inputs: the model's input now: the images, or features of them.
        epoch, step: number of finished epochs, and of steps taken in the present one.
        seconds: spent on the present epoch's steps, without validation and saving.
        skipped: steps of the present epoch that were not taken, since the gradient was not finite.
        feature_seconds: spent before the steps, on features and the linear probe.
        planned: the numbers of epochs that were asked for, one after another; each has other rates.
        history: a row for each finished epoch, as in metrics.jsonl.
        best: the best epoch so far.
        average: moving average of the weights, which is validated in place of them if there is one.
        temperature: by which the head was divided at the end, to calibrate it; set from outside.
        frozen: figures of the base's features, as `Probe` has them.
        draws: the random state to continue from.
        totals: (3,) of the present epoch and this process: loss, right predictions, images.
        listeners: called with the row of every epoch that is finished.

    Raises:
        ValueError: the plan does not suit the device or the model.
    """

    def __init__(
        self,
        model: VisionTransformer,
        train: Images,
        validation: Images,
        plan: Plan,
        folder: Path,
        belongs: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.inputs, self.validation_inputs = train, validation
        self.plan, self.folder, self.options = plan, folder, dict(options or {})
        self.device, self.image_size = next(model.parameters()).device, model.image_size
        if plan.recorded and self.device.type != "cuda":
            raise ValueError(f"recorded=True is for CUDA; the model is on {self.device.type}")
        if (plan.compiled or plan.recorded) and plan.in_parts and varies(model):
            # Each part draws the whole batch's numbers again. What is compiled draws others, and a
            # recorded step cannot go back.
            self.plan = plan = replace(plan, compiled=False, recorded=False)
        self.updates = Updates(model, plan)
        self.trainable = self.updates.parameters
        self.steps_per_epoch = math.ceil(len(train) / plan.batch_size)
        self.belongs = [*model.classes, train.digest(), validation.digest(), *belongs]
        self.contents = [train.contents, validation.contents]
        self.epoch, self.step, self.seconds, self.feature_seconds = 0, 0, 0.0, 0.0
        self.planned = [plan.epochs]
        self.history: list[dict[str, Any]] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.best, self.average = Best(), Average(self.trainable, plan.ema)
        self.frozen: dict[str, float] = {}
        self.skipped = 0
        self.temperature = 1.0
        self.draws = seeded_state(plan.seed, self.device)
        self.totals = torch.zeros(3, device=self.device)

    def order(self) -> Tensor:
        """Return the indices of the epoch's remaining images, ordered by seed and epoch."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch)
        if self.plan.sample == "balanced":
            labels = self.train.strata()
            chances = 1 / labels.bincount()[labels].double()
            order = torch.multinomial(chances, len(labels), replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self.train), generator=generator)
        return order[self.step * self.plan.batch_size :]

    def shares(self) -> list[Rows]:
        """Return this process's share of each remaining batch of the epoch."""
        n, size = len(self.train), self.plan.batch_size
        return [Rows.of(min(size, n - i)) for i in range(self.step * size, n, size)]

    def batches(self, shares: Sequence[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield these shares of the remaining batches: images as held (b, ...), labels (b, ...)."""
        order = self.order().split([rows.n for rows in shares])
        own = [rows.chosen(batch) for rows, batch in zip(shares, order, strict=True)]
        return self.inputs.batches(own, self.device)

    def lr(self, step: int) -> float:
        """Return the learning rate at a step of the present epoch."""
        progress = (self.epoch + (step + 0.5) / self.steps_per_epoch) / self.plan.epochs
        return self.plan.lr * lr_factor(self.plan.schedule, progress, warmup=self.plan.warmup)

    def update(self) -> bool:
        """Clip the gradients of the parameters and take an optimizer step.

        Returns:
            Whether the step was skipped: the gradient is not finite, and the plan skips such steps.

        Raises:
            ValueError: a trainable parameter has no gradient, as the model computes without it.
            NotFinite: on a CPU, where the check costs no wait, before a parameter is changed.
        """
        norm = self.updates.norm()
        if self.plan.on_nan == "skip" and not norm.isfinite():
            self.updates.drop_gradients()
            self.skipped += 1
            return True
        self.updates.steps.update(norm)
        if self.device.type == "cpu":
            check_steps(self)
        self.updates.step()
        return False

    def autocast(self) -> torch.autocast:
        """Return the context for the forward pass: bfloat16, where the plan says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16)

    @property
    def kept(self) -> dict[str, Any]:
        """The metrics.jsonl row of the epoch whose weights are kept.

        It is {} before the first epoch, and where the last weights are kept and a run is stopped
        within an epoch: no row is of these.
        """
        last = self.history[-1] if self.history and not self.step else {}
        return self.best.row or last if self.plan.keep == "best" else last

    def is_done(self) -> bool:
        """Return whether no epoch is left, or validation has not improved for `patience` epochs."""
        since = self.epoch - (self.best.row["epoch"] if self.best.row else self.epoch)
        return self.epoch >= self.plan.epochs or 0 < self.plan.patience <= since

    def use_kept_weights(self) -> None:
        """Give the model the weights to keep: of the best epoch, else the average, else its own."""
        put(self.best.weights or self.average.values, self.trainable)
