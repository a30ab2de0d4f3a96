"""Metrics against their definitions, written out."""

import pytest
import torch
import torch.nn.functional as F

from vitft.evaluation.evaluate import Evaluation
from vitft.evaluation.metrics import (
    balanced_accuracy,
    calibration_error,
    macro_f1,
    recalls,
    temperature,
)

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def test_every_class_counts_alike() -> None:
    assert recalls(PREDICTED, LABELS, 4)[:3].tolist() == [0.75, 0.5, 1.0]
    assert recalls(PREDICTED, LABELS, 4)[3].isnan()
    assert balanced_accuracy(PREDICTED, LABELS, 4) == pytest.approx((0.75 + 0.5 + 1) / 3)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    expected = []
    for k in range(3):
        right = ((k == PREDICTED) & (k == LABELS)).sum().item()
        precision, recall = (
            right / (k == PREDICTED).sum().item(),
            right / (k == LABELS).sum().item(),
        )
        expected.append(2 * precision * recall / (precision + recall))
    assert macro_f1(PREDICTED, LABELS, 4) == pytest.approx(sum(expected) / 3)


def test_a_class_that_is_never_right_counts_as_0() -> None:
    assert macro_f1(torch.tensor([1, 1]), torch.tensor([0, 1]), 2) == pytest.approx((0 + 2 / 3) / 2)


def test_the_calibration_error_is_the_gap_of_each_bin_by_its_size() -> None:
    probabilities = torch.rand(500, 4).double().pow(3).softmax(dim=1) ** 2
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    labels = torch.randint(0, 4, (500,))
    sure, predicted = probabilities.max(dim=1)
    expected = 0.0
    for i in range(15):
        inside = (sure > i / 15) & (sure <= (i + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            expected += inside.double().mean().item() * abs(accuracy - sure[inside].mean()).item()
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


def test_the_temperature_undoes_logits_that_are_too_large() -> None:
    logits = 2 * torch.randn(20_000, 5).double()
    labels = logits.softmax(dim=1).multinomial(1).flatten()
    for factor in (0.5, 1.0, 3.0):
        found = temperature((factor * logits).softmax(dim=1), labels)
        assert found == pytest.approx(factor, rel=0.05)
        hot = calibration_error((factor * logits).softmax(dim=1), labels)
        assert calibration_error((factor * logits / found).softmax(dim=1), labels) <= hot + 1e-3


def test_an_evaluation_tells_them() -> None:
    one = Evaluation(F.one_hot(PREDICTED, 4).double(), LABELS, torch.zeros(7))
    assert one.figures["accuracy"] == one.accuracy == pytest.approx(5 / 7)
    assert one.figures["balanced_accuracy"] == balanced_accuracy(PREDICTED, LABELS, 4)
    assert one.figures["macro_f1"] == macro_f1(PREDICTED, LABELS, 4)
    assert one.figures["calibration_error"] == pytest.approx(2 / 7)
