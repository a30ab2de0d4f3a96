"""The gradients of a step: of one run alone, or of several runs together."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitft.bars import note
from vitft.devices.cores import each, in_parts, n_parts
from vitft.devices.memory import is_out_of_memory
from vitft.devices.processes import n_processes
from vitft.devices.shares import Rows
from vitft.devices.spread import data_parallel, shared_step
from vitft.evaluation.features import n_frozen
from vitft.model.vit import VisionTransformer
from vitft.training.draws import random_state, set_random_state
from vitft.training.forward import Pass
from vitft.training.run import Run

Join = Callable[[list[VisionTransformer]], VisionTransformer]


class Alone:
    """The gradients of one run's batches.

    On a CPU the parts of a batch are computed in parallel, unless that changes what is computed.

    Args:
        run: as `Step` takes it.
        stage: the stage that its inputs go into.
        is_random: whether its model draws random numbers or changes buffers in training.

    Attributes:
        models: the model.
        forward: its pass from `stage` on.
        accumulate: in how many parts a batch is computed, one after the other.
        redraws: whether each part draws for the whole batch, so that dropout is that of the
            batch computed at once.
    """

    def __init__(self, run: Run, stage: int, *, is_random: bool) -> None:
        self.run, self.models, self.accumulate = run, [run.model], run.plan.accumulate
        self.forward = data_parallel(Pass(run, stage))
        self.is_divisible = not (is_random or run.plan.compiled) and n_processes() == 1
        self.redraws = is_random

    def __call__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], rows: Rows) -> None:
        """Leave the gradients of a batch in the run's parameters, and add to its totals.

        Args:
            inputs: of `stage`, one tensor (b, ...).
            targets: one tensor (b, n_classes).
            rows: which images of the batch these are.
        """
        backward = self._backward_in_memory if self.run.plan.auto_accumulate else self._backward
        backward(inputs[0], targets[0], rows)

    def _backward(self, inputs: Tensor, targets: Tensor, rows: Rows) -> None:
        """Do as `__call__` says, in the parts that plan, cores and processes ask for."""
        run, parallel = self.run, self.is_divisible and self.accumulate == 1
        n = n_parts(run.device, rows.n) if parallel else min(rows.least, self.accumulate)
        pieces = zip(inputs.tensor_split(n), targets.tensor_split(n), strict=True)
        if n > 1 and parallel:
            for gradients, totals in each(partial(self._gradients, rows.n), pieces):
                run.totals += totals
                add_gradients(run.trainable, gradients)
            return
        # of an image's loss; DDP divides the sum of gradients by the number of processes
        weight = rows.count * n_processes() / rows.n
        draws = random_state(run.device) if n > 1 and self.redraws else None
        parts = rows.split(n, named=draws is not None)
        for i, (part, (x, y)) in enumerate(zip(parts, pieces, strict=True), start=1):
            if draws is not None:
                set_random_state(draws, run.device)
            with shared_step(self.forward, part, last=i == n):
                loss, totals = loss_and_totals(run, self.forward(x), y)
                (loss * weight).backward()
            run.totals += totals * rows.count

    def _backward_in_memory(self, inputs: Tensor, targets: Tensor, rows: Rows) -> None:
        """Do as `_backward`; where memory runs out, in twice as many parts from then on."""
        run = self.run
        draws, totals = random_state(run.device), run.totals.clone()
        while True:
            try:
                return self._backward(inputs, targets, rows)
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

    def _gradients(
        self, n: int, inputs: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Return the gradients of a part of a batch of `n` images, and its totals (3,)."""
        loss, totals = loss_and_totals(self.run, self.forward(inputs), targets)
        parameters = [*self.run.trainable.values()]
        return torch.autograd.grad(loss / n, parameters, allow_unused=True), totals


class Together:
    """The gradients of several runs' batches; runs of a group share one pass of a joint model.

    Args:
        runs: as `Step` takes them.
        set_of: for each run, which of the batches is its own.
        join: see `Step`.
        stage: the stage that their inputs go into.
        is_random: whether their models draw random numbers or change buffers in training.

    Attributes:
        n_shared: the number of first stages that are frozen, and so the same, in all runs.
        groups: the runs, by index, whose batches take the same pass.
        models: the joint model of each group.
    """

    def __init__(
        self, runs: Sequence[Run], set_of: Sequence[int], join: Join, stage: int, *, is_random: bool
    ) -> None:
        first = runs[0]
        self.runs, self.set_of, self.stage = runs, set_of, stage
        self.n_shared = max(stage, min(n_frozen(run.model) for run in runs))
        self.groups = group_runs(first.device, len(runs), first.plan.batch_size, whole=is_random)
        self.models = [join([runs[i].model for i in group]) for group in self.groups]

    def __call__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], _: Rows) -> None:
        """Leave every run's gradients in its parameters, and add to its totals.

        Args:
            inputs: for every leader, of `stage` (B, ...).
            targets: for every leader (B, n_classes).
        """
        shared = [self._shared_stages(x) for x in inputs]
        groups = zip(self.groups, self.models, strict=True)
        backward = partial(self._backward_group, shared, targets)
        list(each(backward, groups))

    def _shared_stages(self, inputs: Tensor) -> Tensor:
        """Return the output of the shared frozen stages for a leader's inputs."""

        def part(x: Tensor) -> Tensor:
            with torch.no_grad(), self.runs[0].autocast():
                return self.models[0].run(x, self.stage, self.n_shared)

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
