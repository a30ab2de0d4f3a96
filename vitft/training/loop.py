"""The one training loop: a model, images and a plan in; a trained model and its metrics out."""

import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vitft.data.images import Images
from vitft.files import write_bytes
from vitft.model.vit import VisionTransformer
from vitft.training.cores import each, n_parts
from vitft.training.evaluate import evaluate, resample
from vitft.training.features import extract
from vitft.training.graphs import Recorded
from vitft.training.optim import build_optimizers, lr_factor, set_lr
from vitft.training.plan import Plan
from vitft.training.state import STATE, load_state, random_state, save_state, set_random_state
from vitft.training.stop import Interrupted, stop_signals

PLACE = ("epoch", "step", "seconds", "history")  # of a run in its data


class Fit:
    """A training run: the model, its optimizers, the place in the data and what was measured.

    Args:
        belongs: what else must be the same to go on, such as the base's fingerprint.

    Attributes:
        history: a row an epoch, as in metrics.jsonl.

    Raises:
        ValueError: the plan does not suit the device.
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
        self.model, self.train, self.validation, self.plan = model, train, validation, plan
        self.folder = folder
        self.device = next(model.parameters()).device
        if plan.recorded and self.device.type != "cuda":
            raise ValueError(f"recorded=True is for CUDA; the model is on {self.device.type}")
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(
            model,
            name=plan.optimizer,
            lr=plan.lr,
            weight_decay=plan.weight_decay,
            lr_factors=plan.lr_factors,
            recorded=plan.recorded,
        )
        self.steps_per_epoch = max(1, len(train) // plan.batch_size)
        self.epoch, self.step = 0, 0  # step: in this epoch
        self.seconds = 0.0  # trained in this epoch, without validation and saving
        self.saved = time.perf_counter()  # when the state was, last
        self.feature_seconds = 0.0  # before the first epoch, see `Plan.n_cached`
        self.sums = torch.zeros(3, device=self.device)  # of loss, right answers, images
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(plan.seed)
        self.draws = random_state(self.device)  # that training begins with
        self.belongs = [*model.classes, train.digest(), validation.digest(), *belongs]
        self.prepare, self.stages = self._prepare, model.stages()
        if plan.compiled:  # here, and not in place, since evaluation is too short to compile for
            self.prepare = torch.compile(self._prepare, dynamic=False)
            self.stages = [torch.compile(stage, dynamic=False) for stage in self.stages]
        self.learn = Recorded(self._learn) if plan.recorded else self._learn

    def run(self) -> list[dict[str, Any]]:
        """Train to the end and return the history; the model then takes images again.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with the state saved.
            ValueError: the loss is no longer finite.
        """
        set_random_state(self.draws, self.device)
        self.save()
        self.cache()
        with stop_signals() as stop, self.bar() as bar:
            while self.epoch < self.plan.epochs:
                self._run_epoch(stop, bar)
                self.finish_epoch(bar)
            self.model.first = 0
            self.save()
            if stop:  # during the last validation: nothing is lost, and nothing more is wanted
                raise Interrupted(stop[0])
        return self.history

    def cache(self) -> None:
        """Let the first stages make of the images, once, what the rest then trains on."""
        n = self.plan.n_cached
        if n and self.epoch < self.plan.epochs:
            started = time.perf_counter()
            self.train, self.validation = (
                extract(self.model, images, n, folder=self.folder, bf16=self.plan.bf16)
                for images in (self.train, self.validation)
            )
            self.model.first = n
            self.synchronize()
            self.feature_seconds = time.perf_counter() - started

    def save(self) -> None:
        """Write what `restore` needs, whole or not at all."""
        place = {name: getattr(self, name) for name in PLACE}
        place |= {"sums": self.sums.tolist(), "belongs": self.belongs}
        save_state(self.folder / STATE, self.model, self.optimizers, place)
        self.saved = time.perf_counter()

    def restore(self) -> None:
        """Go back, before the first step, to the state that was saved last.

        Raises:
            FileNotFoundError: nothing was saved.
            ValueError: the saved state is broken or belongs to another model.
        """
        place = load_state(self.folder / STATE, self.model, self.optimizers)
        self.draws = random_state(self.device)
        if place.pop("belongs", None) != self.belongs:
            raise ValueError(
                f"the run in {self.folder} was started on other images, classes or another base; "
                "put them back, or start again with --overwrite"
            )
        try:
            self.sums.copy_(torch.tensor(place["sums"]))
            for name in PLACE:
                setattr(self, name, place[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder / STATE} is broken ({error}); start again with --overwrite"
            ) from error

    def _run_epoch(self, stop: list[int], bar: "tqdm[Any]") -> None:
        self.model.train()
        self.model.resize(self.plan.image_size(self.epoch, self.model.config.image_size))
        shown = now = time.perf_counter()
        started = now - self.seconds
        for images, labels in self.train.batches(self.order(), self.plan.batch_size, self.device):
            self.train_step(images, labels)
            self.step += 1
            bar.update(len(labels))
            now = time.perf_counter()
            if now - shown > 0.5 and not bar.disable:
                shown = now
                self.show(bar)
            if stop or now - self.saved > self.plan.save_seconds > 0:
                self.seconds = now - started
                self.save()
                started += self.saved - now
            if stop:
                raise Interrupted(stop[0])
        self.synchronize()
        self.seconds = time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait for the device, so that the clock tells what was computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def order(self) -> Tensor:
        """Return the indices still to come in this epoch; only whole batches, if there is one."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.train), generator=generator)
        first = self.step * self.plan.batch_size
        return order[first : self.steps_per_epoch * self.plan.batch_size]

    def _lr(self, step: int) -> float:
        progress = (self.epoch + (step + 0.5) / self.steps_per_epoch) / self.plan.epochs
        return self.plan.lr * lr_factor(self.plan.schedule, progress, warmup=self.plan.warmup)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Move the parameters by the gradient of one batch."""
        self.set_lr()
        self.learn(*self.prepare(images, labels))

    def set_lr(self) -> None:
        """Give the optimizers this step's learning rate."""
        set_lr(self.optimizers, self._lr(self.step))

    def _prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the model takes of a batch, augmented, and targets (B, n_classes)."""
        targets = F.one_hot(labels, self.model.head.out_features).float()
        if not self.model.first:  # else they are features
            images, targets = self.plan.augmentation(images.float(), targets)
            images = resample(self.model.normalize(images), self.model.image_size)
        return images, targets

    def _learn(self, images: Tensor, targets: Tensor) -> None:
        """Take a step by the gradients of a batch's parts, added up in their order."""
        n = 1 if self.plan.compiled else n_parts(self.model, len(images))
        parts = zip(images.tensor_split(n), targets.tensor_split(n), strict=True)
        for gradients, sums in each(partial(self._gradients, len(images)), parts):
            self.sums += sums
            for parameter, gradient in zip(self.trainable, gradients, strict=True):
                if parameter.grad is None:  # a copy, whole and contiguous, as optimizers expect
                    parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
                else:
                    parameter.grad += gradient
        self.update()

    def _gradients(
        self, n_images: int, images: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return a part's share of the gradients of a batch of `n_images`, and its sums."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16):
            for stage in self.stages[self.model.first :]:
                images = stage(images)
        loss, sums = self.loss(images, targets)
        share = loss * (len(images) / n_images)
        return torch.autograd.grad(share, self.trainable, materialize_grads=True), sums

    def loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, and its share of `sums`."""
        smoothing = self.plan.label_smoothing
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        right = (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        n = len(targets)
        return loss, torch.stack([loss.detach() * n, right, torch.full_like(right, n)])

    def update(self) -> None:
        """Take a step with the gradients that stand in the parameters."""
        if self.plan.clip:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def finish_epoch(self, bar: "tqdm[Any]", name: str = "") -> None:
        """Validate, write the epoch's line of metrics.jsonl, and show it, with the run's name.

        Raises:
            ValueError: the loss or a weight is no longer finite.
        """
        loss, n_images = (self.sums[0] / self.sums[2]).item(), int(self.sums[2])
        finite = torch.stack([p.isfinite().all() for p in self.trainable]).all()
        if not (math.isfinite(loss) and finite):
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1}, or a weight is no longer finite; "
                "try a smaller --lr"
            )
        result = None
        if len(self.validation):
            result = evaluate(self.model, self.validation, bf16=self.plan.bf16)
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss,
            "val_loss": result.loss if result else None,
            "val_accuracy": result.accuracy if result else None,
            "lr": self._lr(self.steps_per_epoch - 1),
            "images_per_second": n_images / self.seconds,
            "seconds": self.seconds,
        }
        self.history.append(row)
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_bytes(self.folder / "metrics.jsonl", lines.encode())
        bar.write(f"{name}{_line(row)}", file=sys.stderr)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    def bar(self) -> "tqdm[Any]":
        """Return a progress bar of the run's images, on standard error where that is a terminal."""
        per_epoch = min(len(self.train), self.steps_per_epoch * self.plan.batch_size)
        return tqdm(
            total=self.plan.epochs * per_epoch,
            initial=self.epoch * per_epoch + self.step * self.plan.batch_size,
            unit=" images",
            disable=None,
            dynamic_ncols=True,
        )

    def show(self, bar: "tqdm[Any]") -> None:
        """Show the epoch's loss and accuracy so far."""
        loss, accuracy, _ = (self.sums / self.sums[2]).tolist()
        bar.set_postfix_str(
            f"epoch {self.epoch + 1}/{self.plan.epochs}, loss {loss:.3f}, accuracy {accuracy:.1%}"
        )


def _line(row: dict[str, Any]) -> str:
    validation = ""
    if row["val_loss"] is not None:
        validation = f"  validation {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.2%}"
    speed = f"{row['images_per_second']:,.0f} images/s, {row['seconds']:.1f} s"
    return f"epoch {row['epoch']:>3}  loss {row['train_loss']:.3f}{validation}  {speed}"
