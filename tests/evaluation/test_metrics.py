"""Metrics against their definitions, written out."""

import pytest
import torch
import torch.nn.functional as F

from vitft.evaluation.evaluate import Evaluation
from vitft.evaluation.metrics import (
    balanced_accuracy,
    calibration_error,
    macro_f1,
    mean_average_precision,
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


def test_the_temperature_stays_in_its_range() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    assert temperature(probabilities, torch.tensor([0, 1])) == pytest.approx(1 / 20, rel=1e-4)
    assert temperature(probabilities, torch.tensor([1, 0])) == pytest.approx(20, rel=1e-4)


def test_an_evaluation_tells_them() -> None:
    one = Evaluation(F.one_hot(PREDICTED, 4).double(), LABELS, torch.zeros(7))
    assert one.figures["accuracy"] == one.accuracy == pytest.approx(5 / 7)
    assert one.figures["balanced_accuracy"] == balanced_accuracy(PREDICTED, LABELS, 4)
    assert one.figures["macro_f1"] == macro_f1(PREDICTED, LABELS, 4)
    assert one.figures["calibration_error"] == pytest.approx(2 / 7)


def test_average_precision_is_the_mean_of_precision_at_each_hit() -> None:
    labels = torch.tensor([1, 0, 1, 0, 1])[:, None]
    probabilities = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])[:, None]
    expected = (1 / 1 + 2 / 3 + 3 / 5) / 3
    assert mean_average_precision(probabilities, labels) == pytest.approx(expected)
    both = torch.cat([labels, torch.zeros_like(labels)], dim=1)  # a class that is never there
    assert mean_average_precision(probabilities.expand(5, 2), both) == pytest.approx(expected)


def test_average_precision_counts_equals_together() -> None:
    probabilities, labels = torch.randint(0, 5, (60, 3)) / 4, torch.randint(0, 2, (60, 3))
    found = []
    for p, there in zip(probabilities.T, labels.T > 0, strict=True):
        shares = [there[p >= x].double().mean() for x in p[there]]
        found.append(torch.stack(shares).mean())
    expected = torch.stack(found).mean().item()
    assert mean_average_precision(probabilities, labels) == pytest.approx(expected)
