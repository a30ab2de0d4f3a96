"""A model and labelled images in; probabilities, accuracy and loss out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.devices.cores import in_parts
from vitft.devices.processes import gathered
from vitft.devices.shares import own_batches, own_slice
from vitft.devices.spread import is_sharded
from vitft.evaluation.task import SingleLabel, Task
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images

MAX_BATCH = 500  # images of a batch in evaluation
MAX_NUMBERS = 2**26  # in the widest activation of a batch: 256 MB in float32


@dataclass(frozen=True)
class Evaluation:
    """Probabilities (n, n_classes), labels (n, ...) and losses (n,) in nats, on the CPU."""

    probabilities: Tensor
    labels: Tensor
    losses: Tensor
    task: Task = field(default_factory=SingleLabel)

    @cached_property
    def figures(self) -> dict[str, float]:
        """The task's metrics: accuracy and more."""
        return self.task.figures(self.probabilities, self.labels)

    @property
    def accuracy(self) -> float:
        """Share of images that are predicted right."""
        return self.figures["accuracy"]

    @property
    def loss(self) -> float:
        """Mean loss, in nats."""
        return self.losses.double().mean().item()


def resample(images: Tensor, image_size: int) -> Tensor:
    """Return images (B, C, height, width) scaled to (B, C, image_size, image_size) by area."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode="area")


def compute(
    model: VisionTransformer,
    batch: Tensor,
    *,
    stage: int = 0,
    last: int | None = None,
    bf16: bool = False,
) -> Tensor:
    """Return the output of the stages stage..last - 1 for a batch, without gradients.

    Args:
        model: the model, in the mode that it is to compute in.
        batch: the input of stage `stage`: pixels, uint8 (B, C, height, width), for stage 0, else
            features.
        stage: the first stage to compute.
        last: the stage before which to end; None for all, which gives logits (B, n_classes).
        bf16: compute in bfloat16.
    """

    def part(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if stage == 0:
                x = resample(model.normalize(x), model.image_size)
            return model.run(x, stage, last)

    return part(batch) if is_sharded(model.head.weight) else in_parts(part, batch)


def evaluate(
    model: VisionTransformer,
    images: Images,
    *,
    task: Task = SingleLabel(),  # noqa: B008 (frozen)
    bf16: bool = False,
    batch_size: int | None = None,
) -> Evaluation:
    """Return the model's predictions, in evaluation mode, for every image.

    Images are scaled to the size that the model takes now. Several processes share the images, and
    each of them gets all predictions.

    Args:
        model: the model; every module is left in the mode that it was in.
        images: pixels, or features of the model's first stages.
        task: turns logits into probabilities, losses and metrics.
        bf16: compute in bfloat16.
        batch_size: images at a time; by default see `suitable_batch`.
    """
    batch_size = batch_size or suitable_batch(model)
    parts, device = own_batches(len(images), batch_size), next(model.parameters()).device
    probabilities = [torch.empty(0, model.head.out_features)]
    labels, losses = [images.labels[:0].cpu()], [torch.empty(0)]
    with evaluating(model):
        for batch, batch_labels in images.batches(parts, device):
            logits = compute(model, batch, stage=images.stage, bf16=bf16).float()
            probabilities.append(task.predict(logits).cpu())
            labels.append(batch_labels.cpu())
            losses.append(task.loss(logits, task.targets(batch_labels, logits.shape[1])).cpu())
    own = own_slice(len(images))
    n_own = own.stop - own.start
    whole = [gathered(torch.cat(found)[:n_own]) for found in (probabilities, labels, losses)]
    return Evaluation(whole[0], whole[1], whole[2], task)


def suitable_batch(model: VisionTransformer) -> int:
    """Return how many images to evaluate at a time, as limited by the size of activations."""
    n_tokens = (model.image_size // model.config.patch_size) ** 2
    return max(1, min(MAX_BATCH, MAX_NUMBERS // (n_tokens * model.config.hidden_dim)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards every module has its earlier mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
