"""A model's task, one label an image or several: labels and logits in; loss and metrics out."""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitft.evaluation.metrics import (
    balanced_accuracy,
    calibration_error,
    macro_f1,
    mean_average_precision,
)


class Task(Protocol):
    """What training and evaluation need of a task; logits are (B, n_classes)."""

    def targets(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return float targets (B, n_classes) for labels (B, ...); augmentation may blend them."""

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the loss of every image (B,)."""

    def predict(self, logits: Tensor) -> Tensor:
        """Return probabilities (B, n_classes)."""

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return bool (B,): whether each image is predicted right."""

    def figures(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metrics of predictions (n, n_classes) for labels (n, ...), by name."""


@cache
def _tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


def balanced(labels: Tensor, n_classes: int) -> tuple[float, ...]:
    """Return for each class n / (n_classes * its images): all classes then weigh the same.

    Args:
        labels: of the n training images (n,).
        n_classes: number of classes; one without images gets 0.
    """
    counts = labels.cpu().bincount(minlength=n_classes).double()
    weights = len(labels) / (n_classes * counts.clamp_min(1))
    return tuple(torch.where(counts > 0, weights, 0).tolist())


@dataclass(frozen=True)
class SingleLabel:
    """One label an image: cross-entropy over the classes, in nats.

    Attributes:
        weights: a factor on the loss of each class; () for 1 throughout.
    """

    weights: tuple[float, ...] = ()

    def targets(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return one-hot targets (B, n_classes) in float32 for labels (B,)."""
        return F.one_hot(labels, n_classes).float()

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of every image (B,), with label smoothing (arXiv:1512.00567)."""
        weight = _tensor(self.weights, logits.device, logits.dtype) if self.weights else None
        return F.cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="none")

    def predict(self, logits: Tensor) -> Tensor:
        """Return probabilities (B, n_classes), which add up to 1."""
        return logits.softmax(dim=1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return bool (B,): whether each image's most probable class is its target's."""
        return logits.argmax(dim=1) == targets.argmax(dim=1)

    def figures(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        """Return accuracy, balanced accuracy, macro F1 and calibration error, see `metrics`."""
        predicted, n = probabilities.argmax(dim=1), probabilities.shape[1]
        return {
            "accuracy": (predicted == labels).double().mean().item(),
            "balanced_accuracy": balanced_accuracy(predicted, labels, n),
            "macro_f1": macro_f1(predicted, labels, n),
            "calibration_error": calibration_error(probabilities, labels),
        }


@dataclass(frozen=True)
class SeveralLabels:
    """Any number of labels an image: binary cross-entropy of every class, in nats."""

    def targets(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return labels (B, n_classes), of 0 and 1, in float32."""
        return labels.float()

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return each image's mean binary cross-entropy (B,); targets are smoothed towards 1/2."""
        targets = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def predict(self, logits: Tensor) -> Tensor:
        """Return the probability of every class (B, n_classes), independent of the others."""
        return logits.sigmoid()

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return bool (B,): whether all classes of each image are predicted right."""
        return ((logits > 0) == (targets > 0.5)).all(dim=1)

    def figures(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        """Return mean average precision and, at a threshold of 1/2, accuracy and macro F1.

        Accuracy is the share of images whose classes are all predicted right.
        """
        predicted, there = probabilities > 0.5, labels > 0
        both = predicted.sum(dim=0) + there.sum(dim=0)
        f1 = 2 * (predicted & there).sum(dim=0).double() / both
        return {
            "accuracy": (predicted == there).all(dim=1).double().mean().item(),
            "mean_average_precision": mean_average_precision(probabilities, labels),
            "macro_f1": f1.nanmean().item(),
        }


TASKS: dict[str, type[SingleLabel] | type[SeveralLabels]] = {
    "one": SingleLabel,
    "several": SeveralLabels,
}
