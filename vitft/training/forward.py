"""A batch in; the augmented input of the model and its targets, then the logits, out."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitft.devices.shares import Rows, first_and_again
from vitft.evaluation.evaluate import resample
from vitft.training.run import Run


def prepare(
    run: Run, images: Tensor, labels: Tensor, rows: Rows, *, stage: int
) -> tuple[Tensor, Tensor]:
    """Return the input of `stage` for a batch, augmented, and its targets (B, n_classes).

    Stage 0 takes normalised images (B, C, image_size, image_size), a later stage takes features.
    Images are augmented at full size, then scaled down where the model takes smaller ones.

    Args:
        run: gives model and plan.
        images: as they are held: uint8 (B, C, height, width), or features.
        labels: (B, ...).
        rows: which images of the batch these are.
        stage: the stage that the result goes into.
    """
    model, plan = run.model, run.plan
    targets = plan.task.targets(labels, model.head.out_features)
    if stage == 0:
        images, targets = plan.augmentation(images.float(), targets, run.image_size, rows)
        images = resample(model.normalize(images), model.image_size)
    return images, targets


class Pass(nn.Module):
    """The model's forward pass from stage `first` on, as one module, which DDP can wrap.

    Where the plan says so, stages are compiled, or recomputed in the backward pass. The model's own
    stages are not replaced, since evaluation is too short to be worth compiling.
    """

    def __init__(self, run: Run, first: int) -> None:
        super().__init__()
        self.model, self.first, self.autocast = run.model, first, run.autocast
        self.stages: list[Callable[[Tensor], Tensor]] = []
        if run.plan.compiled:
            self.stages = [torch.compile(stage, dynamic=False) for stage in run.model.stages()]
        elif run.plan.checkpoint_blocks:
            embed, *blocks, pool, head = run.model.stages()
            again = partial(checkpoint, use_reentrant=False, context_fn=first_and_again)
            self.stages = [embed, *(partial(again, block) for block in blocks), pool, head]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, n_classes) for the input of stage `first`."""
        with self.autocast():
            if self.stages or self.first:
                # a method of the model, since FSDP2 gathers its parameters only for those
                return self.model.run(x, self.first, stages=self.stages)
            return self.model(x)
