"""A task, of one label an image or several: targets, losses, probabilities, what is right."""

import pytest
import torch
import torch.nn.functional as F

from vitft.evaluation.task import SeveralLabels, SingleLabel


def test_targets_are_one_hot_in_float32() -> None:
    found = SingleLabel().targets(torch.tensor([2, 0]), 4)
    assert torch.equal(found, torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]]))
    assert found.dtype == torch.float32


def test_a_loss_is_the_cross_entropy_of_an_image_from_smoothed_targets() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64)
    targets = torch.rand(5, 3, dtype=torch.float64).softmax(dim=1)
    for smoothing in (0.0, 0.3):
        smooth = (1 - smoothing) * targets + smoothing / 3
        expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1)
        found = SingleLabel().loss(logits, targets, smoothing=smoothing)
        torch.testing.assert_close(found, expected)
    plain = SingleLabel().loss(logits, targets)
    torch.testing.assert_close(plain, SingleLabel().loss(logits, targets, smoothing=0.0))


def test_probabilities_of_an_image_add_up_to_one_in_the_ratios_of_its_logits() -> None:
    logits = torch.randn(4, 3)
    found = SingleLabel().predict(logits)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(found / found[:, :1], (logits - logits[:, :1]).exp())


def test_an_image_is_right_where_its_largest_logit_is_its_largest_target() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.1, 0.9, 0.0], [5.0, 1.0, 4.0]])
    targets = torch.tensor([[0.4, 0.6, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    assert SingleLabel().correct(logits, targets).tolist() == [True, False, False]


def test_the_loss_of_several_labels_is_the_mean_over_classes() -> None:
    logits, labels = torch.randn(5, 3).double(), torch.randint(0, 2, (5, 3))
    task = SeveralLabels()
    targets = task.targets(labels, 3).double()
    for smoothing in (0.0, 0.2):
        smooth = targets * (1 - smoothing) + smoothing * 0.5
        expected = F.binary_cross_entropy(logits.sigmoid(), smooth, reduction="none").mean(dim=1)
        torch.testing.assert_close(task.loss(logits, targets, smoothing=smoothing), expected)
    torch.testing.assert_close(task.loss(logits, targets), task.loss(logits, targets, smoothing=0))
    right = ((logits > 0).long() == labels).all(dim=1)
    assert torch.equal(task.correct(logits, targets), right)
    figures = task.figures(task.predict(logits), labels)
    assert figures["accuracy"] == right.double().mean()
    f1 = []
    for k in range(3):
        found, there = logits[:, k] > 0, labels[:, k] > 0
        f1.append(2 * (found & there).sum().item() / (found.sum() + there.sum()).item())
    assert figures["macro_f1"] == pytest.approx(sum(f1) / 3)
