"""Probabilities and labels in; accuracy metrics and calibration out."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # of the predicted probability, for the calibration error


def recalls(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Return the recall of each class (n_classes,), NaN without images; both arguments are (n,)."""
    right = labels[predicted == labels].bincount(minlength=n_classes)
    return right.double() / labels.bincount(minlength=n_classes)


def balanced_accuracy(predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """Return the mean recall of the classes that have images; both arguments are (n,)."""
    return recalls(predicted, labels, n_classes).nanmean().item()


def macro_f1(predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """Return the mean F1 score of the classes that have images or are predicted.

    A class's F1 is 2 TP / (number predicted + number of its images); both arguments are (n,).
    """
    right = labels[predicted == labels].bincount(minlength=n_classes).double()
    both = predicted.bincount(minlength=n_classes) + labels.bincount(minlength=n_classes)
    return (2 * right / both).nanmean().item()


def mean_average_precision(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean average precision over the classes that have images; NaN where none has.

    A class's average precision is the mean of the precision at each of its images: the share of the
    class's images among all images whose probability is at least as high.

    Args:
        probabilities: (n, n_classes).
        labels: of 0 and 1 (n, n_classes).
    """
    found = []
    for p, there in zip(probabilities.T, labels.T > 0, strict=True):
        if there.any():
            every, right = p.sort().values, p[there].sort().values
            n_every = len(every) - torch.searchsorted(every, right)  # images at least as probable
            n_right = len(right) - torch.searchsorted(right, right)
            found.append((n_right.double() / n_every).mean())
    return torch.stack(found).mean().item() if found else float("nan")


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error (arXiv:1706.04599, equation 3), in 0..1.

    It is the mean, over images in bins of equal width, of |mean confidence - accuracy| of the bin.

    Args:
        probabilities: (n, n_classes).
        labels: (n,).
    """
    sure, predicted = probabilities.double().max(dim=1)
    bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    gap = sure - (predicted == labels).double()
    return gap.new_zeros(BINS).index_add(0, bins, gap).abs().sum().item() / len(labels)


def temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the temperature that calibrates logits when they are divided by it (arXiv:1706.04599).

    It minimises the mean cross-entropy; golden-section search finds it in 1/20..20.

    Args:
        probabilities: softmax (n, n_classes) of the logits before they are divided.
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
