"""A head that starts from a linear probe is the best one for the features, and training goes on."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adapters
from tests.shared import TINY
from tests.shared import Run as Command
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.evaluate import evaluate
from vitft.evaluation.features import extract
from vitft.evaluation.metrics import mean_average_precision
from vitft.evaluation.probe import fit_probe, regression
from vitft.evaluation.task import SeveralLabels, SingleLabel
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run


def images(n: int = 24) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 3)


def gradients(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, decay: float) -> list[Tensor]:
    """Return the gradients of the mean loss + decay / 2 ||W std||^2."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    penalty = (weight * x.std(0, correction=0)).square().sum()
    loss = F.cross_entropy(F.linear(x, weight, bias), y) + decay / 2 * penalty
    return [*torch.autograd.grad(loss, (weight, bias))]


@pytest.mark.parametrize("decay", [0.01, 1.0])
def test_the_regression_ends_where_its_gradient_vanishes(decay: float) -> None:
    x = torch.randn(50, 6, dtype=torch.float64) * torch.arange(1.0, 7) + 3
    y = (x[:, 0] > 3).long() + (x[:, 1] > 4).long()
    weight, bias = regression(x, F.one_hot(y, 3).double(), SingleLabel(), decay)
    for gradient in gradients(x, y, weight, bias, decay):
        assert gradient.abs().max() < 1e-4
    assert gradients(x, y, weight * 1.1, bias, decay)[0].abs().max() > 1e-3


def test_a_constant_feature_does_no_harm() -> None:
    x = torch.cat([torch.randn(20, 2), torch.full((20, 1), 7.0)], dim=1)
    y = F.one_hot((x[:, 0] > 0).long(), 2).float()
    weight, bias = regression(x, y, SingleLabel())
    assert ((F.linear(x, weight, bias)).argmax(1) == y.argmax(1)).float().mean() > 0.9


def test_the_probes_figure_is_that_of_its_head(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0))
    model.new_head("abc")
    some = images(40).to(torch.device("cpu"))
    some.labels = (torch.arange(40) % 8 > 0).long() * 2  # so uneven that the bias decides
    found = fit_probe(model, some, some, SingleLabel(), folder=tmp_path)
    with torch.no_grad():
        for parameter, value in zip(model.head.parameters(), found.head, strict=True):
            parameter.copy_(value)
    assert found.figures["probe_accuracy"] == evaluate(model, some).accuracy
    model.head.bias.data.zero_()
    assert found.figures["probe_accuracy"] > evaluate(model, some).accuracy


def test_neighbours_tell_a_class_that_most_of_them_have(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0))
    some = images(40).to(torch.device("cpu"))
    some.labels = (torch.rand(40, 3) < torch.tensor([0.2, 0.5, 0.8])).to(torch.uint8)
    figures = fit_probe(model, some, some, SeveralLabels(), folder=tmp_path).figures
    x = extract(model, some, len(model.stages()) - 1, folder=tmp_path).held
    assert x is not None
    shares = []
    for row in x.double():
        cosines = F.cosine_similarity(x.double(), row[None])
        near = cosines.argsort(descending=True)[:20]
        weights = (cosines[near] / 0.07).exp()
        shares.append(weights @ some.labels[near].double() / weights.sum())
    right = ((torch.stack(shares) > 0.5) == (some.labels > 0)).all(dim=1)
    assert figures["knn_accuracy"] == right.sum() / 40
    expected = mean_average_precision(torch.stack(shares), some.labels)
    assert figures["knn_mean_average_precision"] == pytest.approx(expected, abs=1e-3)
    assert 0.3 < figures["probe_mean_average_precision"] <= 1


@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("full", [True, False])
def test_training_starts_from_the_probe(cached: int, full: bool, tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0))
    model.new_head("abc")
    if not full:
        adapters.inject(model, None, trainable=("head",))
    some = images().to(torch.device("cpu"))
    options = {"epochs": 1, "batch_size": 8, "weight_decay": 0.0, "n_cached": cached}
    plan = Plan(**options, lr=1e-30, probe_head=True, warmup=0.0)
    with torch.no_grad():
        x = model.features(model.normalize(torch.stack([some.decode(i) for i in range(24)])))
    expected = regression(x, F.one_hot(some.labels, 3).float(), SingleLabel())
    train(Run(model, some, some, plan, tmp_path))
    for found, wanted in zip(model.head.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-3)


def test_the_command_starts_the_head_as_asked(
    vitft: Command, folder: Path, base: Path, tmp_path: Path
) -> None:
    losses = {}
    for start in ("zeros", "probe"):
        out = tmp_path / start
        flags = ["--adapter=lora", "--rank=2", "--epochs=1", "--lr=1e-20", f"--head-start={start}"]
        vitft("finetune", *flags, "--data", folder, "--base", base, "--out", out)
        losses[start] = json.loads((out / "metrics.jsonl").read_text())["val_loss"]
    assert losses["zeros"] == pytest.approx(math.log(3), abs=1e-5)
    assert losses["probe"] < 0.9
    flags = ["--adapter=lora", "--head-start=best", "--data", folder, "--base", base]
    done = vitft("finetune", *flags, "--out", tmp_path / "x", code=2)
    assert "unknown head start 'best'; choose from probe, zeros" in done.stderr
