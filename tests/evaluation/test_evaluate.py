"""Evaluation against the model called by hand, and the states that it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.evaluate import (
    Evaluation,
    compute,
    evaluate,
    evaluating,
    resample,
    suitable_batch,
)
from vitft.evaluation.features import extract
from vitft.evaluation.task import SingleLabel
from vitft.pictures.images import Images

CPU = torch.device("cpu")


def images(n: int, side: int = 8) -> Images:
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 3).to(CPU)


def test_figures_are_those_of_the_model_called_by_hand(tiny: VisionTransformer) -> None:
    data = images(11, side=12)  # scaled to the model's 8
    found = evaluate(tiny.train(), data, batch_size=4)
    assert tiny.training
    x = F.interpolate(tiny.normalize(data.held), size=(8, 8), mode="area")
    with torch.no_grad():
        logits = tiny.eval()(x).float()
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1))
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, data.labels, reduction="none"))
    assert torch.equal(found.labels, data.labels)
    assert found.loss == pytest.approx(F.cross_entropy(logits, data.labels).item())
    right = logits.argmax(dim=1) == data.labels
    assert found.accuracy == pytest.approx(right.double().mean().item())


def test_accuracy_and_loss_are_means_over_images() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    found = Evaluation(probabilities, torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 6.0]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == 3.0


def test_features_are_evaluated_from_their_stage_on(
    tiny: VisionTransformer, tmp_path: Path
) -> None:
    model, data = tiny.float(), images(9)
    features = extract(model, data, 2, folder=tmp_path)
    assert features.stage == 2
    one, other = evaluate(model, features), evaluate(model, data)
    torch.testing.assert_close(one.probabilities, other.probabilities)


def test_a_task_of_another_kind_is_asked_for_its_own_figures(tiny: VisionTransformer) -> None:
    class Hinge(SingleLabel):
        def predict(self, logits: Tensor) -> Tensor:
            return logits.sigmoid()

        def loss(self, logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
            return (1 - logits * (2 * targets - 1)).relu().sum(dim=1)

    data = images(5)
    found = evaluate(tiny, data, task=Hinge())
    logits = compute(tiny, data.held).float()
    torch.testing.assert_close(found.probabilities, logits.sigmoid())
    signs = 2 * F.one_hot(data.labels, 3) - 1
    torch.testing.assert_close(found.losses, (1 - logits * signs).relu().sum(dim=1))


@pytest.mark.parametrize(
    ("stage", "last"), [(0, None), (0, 1), (0, 3), (1, None), (1, 3), (3, None)]
)
def test_a_stretch_of_stages_is_computed_without_a_gradient(
    tiny: VisionTransformer, stage: int, last: int | None
) -> None:
    pixels = images(4).held
    x = pixels if stage == 0 else tiny.run(tiny.normalize(pixels), 0, stage).detach()
    found = compute(tiny, x, stage=stage, last=last)
    expected = tiny.run(tiny.normalize(pixels) if stage == 0 else x, stage, last)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("bf16", [False, True])
def test_only_bf16_computes_in_bfloat16(tiny: VisionTransformer, bf16: bool) -> None:
    model, data = tiny.float(), images(4)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert compute(model, data.held, bf16=bf16).dtype == dtype
    assert compute(model, data.held).dtype == torch.float32
    assert evaluate(model, data, bf16=bf16).probabilities.dtype == torch.float32
    default = evaluate(model, data).probabilities
    assert torch.equal(evaluate(model, data, bf16=bf16).probabilities, default) is not bf16


def test_images_are_scaled_by_area_and_only_where_their_size_is_another() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert resample(x, 4) is x
    torch.testing.assert_close(resample(x, 2), F.avg_pool2d(x, 2))
    wide = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(resample(wide, 4), F.avg_pool2d(wide, (1, 2)))
    assert resample(torch.randn(2, 3, 8, 4), 4).shape == (2, 3, 4, 4)


def test_a_batch_is_never_empty_and_never_over_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(ViTConfig(**TINY))  # 4 patches of 32 numbers
    monkeypatch.setattr("vitft.evaluation.evaluate.MAX_NUMBERS", 4 * 32 * 10)
    assert suitable_batch(model) == 10
    monkeypatch.setattr("vitft.evaluation.evaluate.MAX_NUMBERS", 4 * 32 * 10 - 1)
    assert suitable_batch(model) == 9
    monkeypatch.setattr("vitft.evaluation.evaluate.MAX_NUMBERS", 5)
    assert suitable_batch(model) == 1


def test_images_go_through_the_model_as_many_at_a_time_as_asked(
    tiny: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = VisionTransformer.run

    def run(self: VisionTransformer, x: Tensor, *stages: Any) -> Tensor:
        sizes.append(len(x))
        return plain(self, x, *stages)

    monkeypatch.setattr(VisionTransformer, "run", run)
    evaluate(tiny, images(7), batch_size=3)
    assert sizes == [3, 2, 2]
    monkeypatch.setattr("vitft.evaluation.evaluate.MAX_NUMBERS", 4 * 32 * 5)
    evaluate(tiny, images(7))
    assert sizes[3:] == [4, 3]


def test_modes_come_back_after_an_error_too(tiny: VisionTransformer) -> None:
    tiny.train().blocks[0].eval()
    before = [module.training for module in tiny.modules()]
    with pytest.raises(KeyError), evaluating(tiny):
        raise KeyError([module for module in tiny.modules() if module.training])
    with evaluating(tiny):
        assert not any(module.training for module in tiny.modules())
    assert [module.training for module in tiny.modules()] == before
