"""A training run: a model, its images, a plan and a folder in; saved states and metrics out.

A run holds its progress, saves it and restores it. `vitft.training.loop` takes its steps.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from vitft.devices.processes import add_up, is_first
from vitft.devices.shares import Rows
from vitft.devices.spread import whole
from vitft.evaluation.evaluate import Evaluation, evaluate
from vitft.files import write_bytes
from vitft.model.vit import VisionTransformer
from vitft.optimizers.average import Average, put
from vitft.optimizers.build import lr_factor
from vitft.optimizers.updates import NotFinite, Updates
from vitft.pictures.images import Images
from vitft.records import record_of
from vitft.training.best import Best
from vitft.training.draws import seeded_state
from vitft.training.plan import Plan
from vitft.training.state import NEXT, STATE, load_state, save_state

Count = Annotated[int, msgspec.Meta(ge=0)]
Row = dict[str, int | float | None]
MAX_SKIPPED = 0.5  # share of an epoch's steps; an epoch that skips more is an error


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a saved run; see the attributes of `Run`."""

    epoch: Count
    step: Count
    seconds: float
    history: list[Row]
    totals: tuple[float, float, float]
    belongs: list[str]
    # states of earlier versions lack the following
    best: Row | None = None
    frozen: dict[str, float] = field(default_factory=dict)
    skipped: Count = 0
    save: str | None = None  # name that all runs saved together have in common; see `Run.save`


class Run:
    """A model in training: its optimizers, its images and its progress.

    Args:
        model: the model to train, on its device.
        train, validation: images; `validation` may be empty.
        plan: how to train.
        folder: for the state and metrics.jsonl.
        belongs: what else must be the same when the run is resumed, such as the base's fingerprint.

    Attributes:
        image_size: full side of the images, in pixels.
        inputs, validation_inputs: the model's input now: the images, or features of them.
        epoch, step: number of finished epochs, and of steps taken in the present one.
        seconds: spent on the present epoch's steps, without validation and saving.
        skipped: steps of the present epoch that were not taken, since the gradient was not finite.
        feature_seconds: spent before the steps, on features and the linear probe.
        history: a row for each finished epoch, as in metrics.jsonl.
        best: the best epoch so far.
        average: moving average of the weights, which is validated in place of them if there is one.
        temperature: by which the head was divided at the end, to calibrate it; set from outside.
        frozen: validation accuracy of the base's features, by "knn" and "probe".
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
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.inputs, self.validation_inputs = train, validation
        self.plan, self.folder = plan, folder
        self.device, self.image_size = next(model.parameters()).device, model.image_size
        if plan.recorded and self.device.type != "cuda":
            raise ValueError(f"recorded=True is for CUDA; the model is on {self.device.type}")
        self.updates = Updates(model, plan)
        self.trainable = self.updates.parameters
        self.steps_per_epoch = math.ceil(len(train) / plan.batch_size)
        self.belongs = [*model.classes, train.digest(), validation.digest(), *belongs]
        self.epoch, self.step, self.seconds, self.feature_seconds = 0, 0, 0.0, 0.0
        self.history: list[dict[str, Any]] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.best, self.average = Best(), Average(self.trainable, plan.ema)
        self.frozen: dict[str, float] = {}
        self.skipped = 0
        self.temperature = 1.0
        self.draws = seeded_state(plan.seed, self.device)
        self.totals = torch.zeros(3, device=self.device)

    def save(self, name: str | None = None) -> None:
        """Write what `restore` needs, whole or not at all; never a state that is not finite.

        Every process calls it, and the first one writes.

        Args:
            name: common to several runs that are saved together. The state then goes into a second
                file, until `confirm` is called once all are written.

        Raises:
            NotFinite: a step, the loss or a weight is not finite; the earlier state stays.
            OSError: the folder cannot be written to.
        """
        add_up(self.totals)
        self.check_finite()
        progress = Progress(
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            history=self.history,
            totals=(*self.totals.tolist(),),
            belongs=self.belongs,
            best=self.best.row,
            frozen=self.frozen,
            skipped=self.skipped,
            save=name,
        )
        path, optimizers = self.folder / (NEXT if name else STATE), self.updates.optimizers
        kept = {"best": self.best.weights, "average": self.average.values}
        save_state(path, self.model, optimizers, self.draws, asdict(progress), kept)
        self.totals *= is_first()  # the first process has the sums now, so that none counts twice

    def confirm(self) -> None:
        """Put the state that was saved under a name in place of the earlier one."""
        (self.folder / NEXT).replace(self.folder / STATE)

    def restore(self) -> None:
        """Restore the state that was saved last.

        Raises:
            FileNotFoundError: nothing was saved.
            ValueError: the saved state is broken, or belongs to another model, base or data set.
        """
        path = self.folder / STATE
        progress, self.draws, kept = load_state(
            path, self.model, self.updates.optimizers, self.device
        )
        try:
            found = record_of(Progress, progress, "its progress", finite=False)
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}); start again with --overwrite") from error
        if found.belongs != self.belongs:
            raise ValueError(
                f"the run in {self.folder} was started on other images, classes or another base; "
                "put them back, or start again with --overwrite"
            )
        self.best.weights, self.average.values = kept["best"], kept["average"]
        self.totals.copy_(torch.tensor(found.totals) * is_first())
        self.epoch, self.step, self.seconds = found.epoch, found.step, found.seconds
        self.history, self.best.row = found.history, found.best
        self.frozen, self.skipped = found.frozen, found.skipped
        self.updates.steps.restart(self.step)

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
            self.check_steps()
        self.updates.step()
        return False

    def autocast(self) -> torch.autocast:
        """Return the context for the forward pass: bfloat16, where the plan says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16)

    def check_finite(self) -> None:
        """Check that every step so far, the loss and the weights are finite; waits for the device.

        Raises:
            NotFinite: one is not; says which, at which step and learning rate, and what to try.
        """
        self.check_steps()
        if not self.totals[0].isfinite():
            raise self._not_finite("the loss is not finite up to", self.step - 1)
        for name, parameter in self.trainable.items():
            if not whole(parameter.detach()).isfinite().all():
                if self.epoch == self.step == 0:
                    raise NotFinite(f"{name!r} is not finite before the first step; mend the base")
                raise self._not_finite(f"{name!r} is not finite after", self.step - 1)

    def check_steps(self) -> None:
        """Check that the gradient of every step so far was finite; this waits for the device.

        Raises:
            NotFinite: one was not; says at which step and learning rate, and what to try.
        """
        if (step := self.updates.steps.first_failed()) is not None:
            raise self._not_finite("the gradient is not finite at", step)

    @property
    def kept(self) -> dict[str, Any]:
        """The metrics.jsonl row of the epoch whose weights are kept; {} before the first epoch."""
        last = self.history[-1] if self.history else {}
        return self.best.row or last if self.plan.keep == "best" else last

    def is_done(self) -> bool:
        """Return whether no epoch is left, or validation has not improved for `patience` epochs."""
        since = self.epoch - (self.best.row["epoch"] if self.best.row else self.epoch)
        return self.epoch >= self.plan.epochs or 0 < self.plan.patience <= since

    def _not_finite(self, what: str, step: int) -> NotFinite:
        """Return the error for what was found at a step of the present epoch, counted from 0."""
        tries = [f"a smaller --lr than {self.plan.lr:g}"]
        tries += [] if self.plan.clip else ["--clip 1"]
        tries += ["--precision fp32"] if self.plan.bf16 else []
        return NotFinite(
            f"{what} step {step + 1} of {self.steps_per_epoch} in epoch {self.epoch + 1}, at "
            f"learning rate {self.lr(step):.3g}; try {' or '.join(tries)}"
        )

    def validate_start(self) -> None:
        """Validate a model whose head is fitted already, as epoch 0.

        Where no later epoch is better and the plan keeps the best, these weights are kept.
        """
        if self.plan.keep == "best" and len(self.validation_inputs):
            result = self._validate()
            figures = {f"val_{name}": value for name, value in result.figures.items()}
            row = {"epoch": 0, "train_loss": None, "val_loss": result.loss, **figures}
            self.best.update(row, self.trainable)

    def use_kept_weights(self) -> None:
        """Give the model the weights to keep: of the best epoch, else the average, else its own."""
        put(self.best.weights or self.average.values, self.trainable)

    def _validate(self) -> Evaluation:
        with self.average.applied():
            return evaluate(
                self.model, self.validation_inputs, task=self.plan.task, bf16=self.plan.bf16
            )

    def finish_epoch(self) -> dict[str, Any]:
        """Validate, write the epoch's line of metrics.jsonl, and return it.

        Raises:
            NotFinite: a step, the loss or a weight is not finite.
        """
        add_up(self.totals)
        self.check_finite()
        if self.skipped > MAX_SKIPPED * self.steps_per_epoch:
            raise self._not_finite(f"{self.skipped} gradients are not finite up to", self.step - 1)
        loss, n_images = (self.totals[0] / self.totals[2]).item(), int(self.totals[2])
        result = self._validate() if len(self.validation_inputs) else None
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss,
            "val_loss": result.loss if result else None,
            "val_accuracy": None,
            **({f"val_{name}": x for name, x in result.figures.items()} if result else {}),
            "lr": self.lr(self.steps_per_epoch - 1),
            **({"skipped_steps": self.skipped} if self.skipped else {}),
            "images_per_second": n_images / self.seconds,
            "seconds": self.seconds,
        }
        self.history.append(row)
        weights = self.average.values or self.trainable
        self.best.update(row, weights if self.plan.keep == "best" else {})
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        if is_first():
            write_bytes(self.folder / "metrics.jsonl", lines.encode())
        self.epoch, self.step, self.seconds, self.skipped = self.epoch + 1, 0, 0.0, 0
        self.totals.zero_()
        self.updates.steps.restart(0)
        for listen in self.listeners:
            listen(row)
        return row
