"""The task of a model: labels and logits in; targets, loss and predictions out."""

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
    """What training and evaluation ask of a task; logits are (B, n_classes)."""

    def targets(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return targets (B, n_classes), which augmentation may mix, for labels (B, ...)."""

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the loss of every image (B,)."""

    def predict(self, logits: Tensor) -> Tensor:
        """Return probabilities (B, n_classes)."""

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return for every image whether it is predicted right (B,), bool."""

    def figures(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metrics of predictions (n, n_classes) for labels (n, ...), by name."""


@cache
def _tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


def balanced(labels: Tensor, n_classes: int) -> tuple[float, ...]:
    """Return for each class n / (n_classes * its images), which gives all classes one weight.

    Args:
        labels: of the training images (n,).
        n_classes: a class without images gets 0.
    """
    counts = labels.cpu().bincount(minlength=n_classes).double()
    weights = len(labels) / (n_classes * counts.clamp_min(1))
    return tuple(torch.where(counts > 0, weights, 0).tolist())


@dataclass(frozen=True)
class SingleLabel:
    """One label an image: cross-entropy over the classes, in nats.

    Attributes:
        weights: what the loss of a class is multiplied by; () for 1 throughout.
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
        """Return for every image whether its most probable class is its target's (B,), bool."""
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
    """Any number of labels an image: for every class, whether it is there; in nats a class."""

    def targets(self, labels: Tensor, n_classes: int) -> Tensor:
        """Return labels (B, n_classes), of 0 and 1, in float32."""
        return labels.float()

    def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the mean binary cross-entropy of every image (B,), smoothed towards 1/2."""
        targets = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def predict(self, logits: Tensor) -> Tensor:
        """Return the probability of every class (B, n_classes), each for itself."""
        return logits.sigmoid()

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return for every image whether all its classes are predicted right (B,), bool."""
        return ((logits > 0) == (targets > 0.5)).all(dim=1)

    def figures(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        """Return mean average precision; at a probability of 1/2 accuracy, of all, and macro F1."""
        right, there = probabilities > 0.5, labels > 0
        both = right.sum(dim=0) + there.sum(dim=0)
        f1 = 2 * (right & there).sum(dim=0).double() / both
        return {
            "accuracy": (right == there).all(dim=1).double().mean().item(),
            "mean_average_precision": mean_average_precision(probabilities, labels),
            "macro_f1": f1.nanmean().item(),
        }


TASKS: dict[str, type[SingleLabel] | type[SeveralLabels]] = {
    "one": SingleLabel,
    "several": SeveralLabels,
}
