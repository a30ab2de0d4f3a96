"""One training step: batches in; every run's parameters updated by the gradient of its batch.

Several runs take their steps through one joint model. Each computes what it would compute by
itself: runs have separate random numbers, gradient clipping and losses. Only dropout in the base is
drawn for all of them together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from vitft.bars import note
from vitft.devices.cores import each, in_parts, n_parts
from vitft.devices.graphs import Recorded
from vitft.devices.memory import is_out_of_memory
from vitft.devices.processes import n_processes
from vitft.devices.shares import Rows
from vitft.devices.spread import data_parallel, shared_step
from vitft.evaluation.features import n_frozen
from vitft.model.vit import VisionTransformer
from vitft.optimizers.updates import NotFinite
from vitft.training.draws import first_varying_stage, random_state, set_random_state
from vitft.training.forward import Pass, prepare
from vitft.training.run import Run

Join = Callable[[list[VisionTransformer]], VisionTransformer]


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
        n_shared: the number of first stages that are frozen, and so the same, in all of several
            runs.
        is_random: whether the model draws random numbers or changes buffers in training. A batch is
            then not computed in parallel parts.
        groups: the runs, by index, whose batches take the same pass; `joints` are their models.
    """

    def __init__(self, runs: Sequence[Run], join: Join) -> None:
        first = runs[0]
        self.runs, self.is_single, self.stage = [*runs], len(runs) == 1, first.inputs.stage
        self.failed: dict[Run, NotFinite] = {}
        keys = [(id(run.train), run.plan.seed) for run in runs]
        sets = list(dict.fromkeys(keys))
        self.set_of = [sets.index(key) for key in keys]
        self.leaders = [runs[keys.index(key)] for key in sets]
        self.is_random = first_varying_stage(first.model) < len(first.model.stages())
        self.n_shared = self.stage
        if not self.is_single:
            self.n_shared = max(self.stage, min(n_frozen(run.model) for run in runs))
        self.groups = group_runs(
            first.device, len(runs), first.plan.batch_size, whole=self.is_random
        )
        models = [[runs[i].model for i in group] for group in self.groups]
        self.joints = [group[0] if self.is_single else join(group) for group in models]
        self.prepare, self.learn, self.accumulate = prepare, self._learn, first.plan.accumulate
        self.forward = data_parallel(Pass(first, self.stage))
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
        inputs, targets = prepared[::2], prepared[1::2]
        before = [run.totals.clone() for run in self.runs if run.plan.on_nan == "skip"]
        if not self.is_single:
            self._backward_together(inputs, targets)
        elif self.runs[0].plan.auto_accumulate:
            self._backward_in_memory(inputs[0], targets[0])
        else:
            self._backward_alone(inputs[0], targets[0])
        for i, run in enumerate(self.runs):
            if self._update(run):
                run.totals.copy_(before[i])

    def _backward_in_memory(self, inputs: Tensor, targets: Tensor) -> None:
        """Do as `_backward_alone`; where memory runs out, in twice as many parts from then on."""
        run = self.runs[0]
        draws, totals = random_state(run.device), run.totals.clone()
        while True:
            try:
                return self._backward_alone(inputs, targets)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.accumulate >= len(inputs):
                    raise
                del error  # its traceback keeps the tensors of the failed pass
            self.accumulate *= 2
            note(f"out of memory: a batch is computed in {self.accumulate} parts from here on")
            run.updates.drop_gradients()
            run.totals.copy_(totals)
            set_random_state(draws, run.device)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward_alone(self, inputs: Tensor, targets: Tensor) -> None:
        """Leave a single run's gradients in its parameters; on a CPU, parts are parallel."""
        run, rows = self.runs[0], self.rows
        divisible = not (self.is_random or run.plan.compiled or self.accumulate > 1)
        parallel = divisible and n_processes() == 1
        n = n_parts(run.device, rows.n) if parallel else min(rows.least, self.accumulate)
        pieces = zip(inputs.tensor_split(n), targets.tensor_split(n), strict=True)
        if n > 1 and parallel:
            for gradients, totals in each(partial(self._gradients, run, rows.n), pieces):
                run.totals += totals
                add_gradients(run.trainable, gradients)
            return
        # of an image's loss; DDP divides the sum of gradients by the number of processes
        weight = rows.count * n_processes() / rows.n
        for i, (part, (x, y)) in enumerate(zip(rows.split(n), pieces, strict=True), start=1):
            with shared_step(self.forward, part, last=i == n):
                loss, totals = loss_and_totals(run, self.forward(x), y)
                (loss * weight).backward()
            run.totals += totals * rows.count

    def _gradients(
        self, run: Run, n: int, inputs: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Return the gradients of a part of a batch of `n` images, and its totals (3,)."""
        loss, totals = loss_and_totals(run, self.forward(inputs), targets)
        parameters = [*run.trainable.values()]
        return torch.autograd.grad(loss / n, parameters, allow_unused=True), totals

    def _backward_together(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Leave every run's gradients in its parameters; each group of runs takes one pass."""
        shared = [self._shared_stages(x) for x in inputs]
        groups = zip(self.groups, self.joints, strict=True)
        backward = partial(self._backward_group, shared, targets)
        list(each(backward, groups))

    def _shared_stages(self, inputs: Tensor) -> Tensor:
        """Return the output of the shared frozen stages for a leader's inputs."""

        def part(x: Tensor) -> Tensor:
            with torch.no_grad(), self.runs[0].autocast():
                return self.joints[0].run(x, self.stage, self.n_shared)

        return in_parts(part, inputs) if self.n_shared > self.stage else inputs

    def _backward_group(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        group: range,
        joint: VisionTransformer,
    ) -> None:
        """Leave the gradients of a group's runs in their parameters.

        Args:
            inputs: for every leader, the output of the shared stages (B, ...).
            targets: for every leader (B, n_classes).
            group: the runs, by index.
            joint: their joint model.
        """
        n = len(inputs[0])
        k = min(n, self.runs[0].plan.accumulate)
        for piece in range(k):
            x = torch.cat([inputs[self.set_of[i]].tensor_split(k)[piece] for i in group])
            with self.runs[0].autocast():
                logits = joint.run(x, self.n_shared).chunk(len(group))
            losses = []
            for i, y in zip(group, logits, strict=True):
                part = targets[self.set_of[i]].tensor_split(k)[piece]
                loss, totals = loss_and_totals(self.runs[i], y, part)
                self.runs[i].totals += totals
                losses.append(loss / n)
            torch.stack(losses).sum().backward()

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


def loss_and_totals(run: Run, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the images' losses (), and (3,): this sum, right predictions, images."""
    task, smoothing = run.plan.task, run.plan.label_smoothing
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = task.loss(logits, targets.to(logits.dtype), smoothing=smoothing).sum()
    correct = task.correct(logits, targets).sum().to(loss.dtype)
    return loss, torch.stack([loss.detach(), correct, torch.full_like(correct, len(targets))])


def group_runs(device: torch.device, n: int, batch_size: int, *, whole: bool) -> list[range]:
    """Return which of `n` runs share a pass: all, or on a CPU as many as fit into a core's cache.

    Args:
        device: of the models.
        n: number of runs.
        batch_size: images of a batch of each run.
        whole: let all runs share one pass in any case.
    """
    n_passes = 1 if whole else min(n, n_parts(device, n * batch_size))
    bounds = [n * i // n_passes for i in range(n_passes + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def add_gradients(
    parameters: Mapping[str, nn.Parameter], gradients: Sequence[Tensor | None]
) -> None:
    """Add gradients to those of the parameters; a parameter without one gets the tensor itself."""
    seen: set[int] = set()
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            parameter.grad += gradient
        else:  # autograd may give two parameters one tensor, or an expanded one
            shares = gradient.data_ptr() in seen or not gradient.is_contiguous()
            parameter.grad = (
                gradient.clone(memory_format=torch.contiguous_format) if shares else gradient
            )
        seen.add(gradient.data_ptr())
