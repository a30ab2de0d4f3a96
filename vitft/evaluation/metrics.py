"""Probabilities and labels in; accuracy metrics and calibration out."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # of probabilities, for the calibration error


def recalls(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Return the share of each class's images that are found (n_classes,); NaN without images."""
    right = labels[predicted == labels].bincount(minlength=n_classes)
    return right.double() / labels.bincount(minlength=n_classes)


def balanced_accuracy(predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """Return the mean recall of the classes that have images."""
    return recalls(predicted, labels, n_classes).nanmean().item()


def macro_f1(predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """Return the mean F1 of the classes that have images or are predicted.

    F1 is 2 right / (predicted + there).
    """
    right = labels[predicted == labels].bincount(minlength=n_classes).double()
    both = predicted.bincount(minlength=n_classes) + labels.bincount(minlength=n_classes)
    return (2 * right / both).nanmean().item()


def mean_average_precision(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of average precision; of classes that are there.

    That of a class is the mean, over its images, of the share of its images among those that are at
    least as probable.

    Args:
        probabilities: (n, n_classes).
        labels: of 0 and 1 (n, n_classes).
    """
    found = []
    for p, there in zip(probabilities.T, labels.T > 0, strict=True):
        if there.any():
            every, own = p.sort().values, p[there].sort().values
            at_least = len(every) - torch.searchsorted(every, own)  # as probable as each of its own
            right = len(own) - torch.searchsorted(own, own)
            found.append((right.double() / at_least).mean())
    return torch.stack(found).mean().item() if found else float("nan")


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error (arXiv:1706.04599, equation 3), in 0..1.

    The mean distance of confidence from accuracy, over bins of equal width.

    Args:
        probabilities: (n, n_classes).
        labels: (n,).
    """
    sure, predicted = probabilities.double().max(dim=1)
    bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    gap = sure - (predicted == labels).double()
    return gap.new_zeros(BINS).index_add(0, bins, gap).abs().sum().item() / len(labels)


def temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return what to divide logits by, so that they are best calibrated (arXiv:1706.04599).

    It has the least mean loss of these labels; found in 1/20 to 20 by golden section.

    Args:
        probabilities: (n, n_classes), of logits divided by 1.
        labels: (n,).
    """
    logits = probabilities.double().clamp_min(1e-30).log()

    def loss(power: float) -> float:
        return F.cross_entropy(logits / 20**power, labels).item()

    low, high, ratio = -1.0, 1.0, (5**0.5 - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(20 ** ((low + high) / 2))
