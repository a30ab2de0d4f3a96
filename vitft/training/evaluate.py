"""A model and labelled images in; the probabilities of its classes, accuracy and loss out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitft.data.images import Images
from vitft.model.vit import VisionTransformer
from vitft.training.cores import in_parts


@dataclass(frozen=True)
class Evaluation:
    """Probabilities (n, n_classes) and labels (n,), on the CPU."""

    probabilities: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """Share of images whose most probable class is theirs."""
        return (self.probabilities.argmax(dim=1) == self.labels).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        chosen = self.probabilities[torch.arange(len(self.labels)), self.labels]
        return -chosen.double().clamp(min=1e-30).log().mean().item()


def resample(images: Tensor, image_size: int) -> Tensor:
    """Return images (B, C, height, width) scaled to (B, C, image_size, image_size) by area."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode="area")


def compute(
    model: VisionTransformer, images: Tensor, *, last: int | None = None, bf16: bool = False
) -> Tensor:
    """Return what the model, or its stages up to, without, `last`, make of images as they are held.

    They are uint8 (B, C, height, width), or features.
    """

    def part(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if not model.first:
                x = resample(model.normalize(x), model.image_size)
            return model(x) if last is None else model.run(x, model.first, last)

    return in_parts(part, model, images)


def evaluate(
    model: VisionTransformer, images: Images, *, bf16: bool = False, batch_size: int = 500
) -> Evaluation:
    """Return what the model, in evaluation mode, makes of every image, at the size it takes now."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    probabilities, labels = [], []
    for batch, batch_labels in images.batches(torch.arange(len(images)), batch_size, device):
        probabilities.append(compute(model, batch, bf16=bf16).float().softmax(dim=1))
        labels.append(batch_labels)
    model.train(was_training)
    return Evaluation(torch.cat(probabilities).cpu(), torch.cat(labels).cpu())
