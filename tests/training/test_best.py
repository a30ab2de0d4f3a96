"""The best epoch is kept, a run ends when nothing gets better, rare classes can count as much."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.shared import Run as Vitft
from tests.shared import summary
from tests.training.test_loop import bright_and_dark, new_run, weights
from vitft import VisionTransformer
from vitft.data.split import few
from vitft.evaluation.evaluate import evaluate
from vitft.evaluation.probe import Probe, fit_probe, neighbours
from vitft.evaluation.task import SingleLabel, balanced
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training import loop
from vitft.training.loop import train
from vitft.training.run import Run
from vitft.training.saving import restore
from vitft.training.stop import Interrupted

WILD = {"lr": 0.3, "epochs": 6, "optimizer": "adamw", "clip": 0.0}  # gets better and worse


def merit(row: dict[str, float]) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]


def trained(run: Run) -> Run:
    train(run)
    return run


def test_the_model_ends_with_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    run = trained(new_run(tmp_path / "best", keep="best", **WILD))
    best = max(run.history, key=merit)
    assert best is not run.history[-1]  # else this shows nothing
    assert run.kept == best
    result = evaluate(run.model, run.validation)
    assert (result.accuracy, result.loss) == (best["val_accuracy"], best["val_loss"])
    last = trained(new_run(tmp_path / "last", keep="last", **WILD))
    assert last.history[-1]["val_loss"] == run.history[-1]["val_loss"]
    assert evaluate(last.model, last.validation).loss == last.history[-1]["val_loss"]


def test_the_best_weights_survive_a_stop(tmp_path: Path) -> None:
    whole = trained(new_run(tmp_path / "whole", keep="best", **WILD))
    first = trained(new_run(tmp_path / "parts", keep="best", **WILD))
    again = new_run(tmp_path / "parts", keep="best", **WILD)
    restore(again)
    assert again.epoch == first.epoch == 6
    train(again)  # nothing is left to do but to put the best weights back
    assert again.kept["epoch"] == whole.kept["epoch"] < 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value)


def test_a_run_ends_when_validation_gets_no_better(tmp_path: Path) -> None:
    run = trained(new_run(tmp_path, keep="best", patience=2, **WILD | {"epochs": 40}))
    best = max(run.history, key=merit)["epoch"]
    assert len(run.history) == best + 2 < 40


def test_a_start_that_no_epoch_betters_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(model: VisionTransformer, images: Images, *others: Any, **options: Any) -> Probe:
        probe = fit_probe(model, images, *others, **options)
        images.labels = 1 - images.labels  # what is learned from now on is wrong
        return probe

    monkeypatch.setattr(loop, "fit_probe", fitted)
    run = new_run(tmp_path, keep="best", probe_head=True, epochs=2, augmentation=Augmentation())
    train(run)
    assert run.kept["epoch"] == 0
    assert merit(run.kept) > max(map(merit, run.history))
    result = evaluate(run.model, run.validation)
    assert (result.accuracy, result.loss) == (run.kept["val_accuracy"], run.kept["val_loss"])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_no_epoch_has_the_last_weights_of_a_run_that_is_stopped_within_one(
    keep: str, tmp_path: Path
) -> None:
    run = new_run(tmp_path, keep=keep, epochs=2)

    plain = run.update

    def update() -> bool:
        if (run.epoch, run.step) == (1, 1):
            signal.raise_signal(signal.SIGTERM)
        return plain()

    run.update = update  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train(run)
    run.use_kept_weights()
    loss = evaluate(run.model, run.validation).loss
    assert run.kept == (run.history[0] if keep == "best" else {})
    assert (loss == run.history[0]["val_loss"]) == (keep == "best")


def test_without_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    run = new_run(tmp_path, keep="best", patience=1, epochs=3)
    run.validation = run.validation_inputs = run.validation.subset(torch.arange(0))
    train(run)
    assert len(run.history) == 3
    assert run.kept == run.history[-1]
    assert run.best.weights == {}


def test_the_loss_of_a_class_is_weighted() -> None:
    logits, labels = torch.randn(7, 3).double(), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    weights = balanced(labels, 4)
    assert weights == pytest.approx((7 / 16, 7 / 8, 7 / 4, 0))
    task = SingleLabel(weights[:3])
    found = task.loss(logits, task.targets(labels, 3).double())
    plain = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, plain * torch.tensor(weights).double()[labels])


def test_a_balanced_epoch_shows_every_class_as_often(tmp_path: Path) -> None:
    run = new_run(tmp_path, sample="balanced")
    labels = torch.tensor([0] * 380 + [1] * 20)
    run.train = Images(lambda i: torch.zeros(3, 8, 8, dtype=torch.uint8), labels)
    order = run.order()
    assert len(order) == 400
    assert 150 < labels[order].sum() < 250
    assert torch.equal(order, run.order())
    run.epoch = 1
    assert not torch.equal(order, run.order())


def test_few_images_of_each_class_are_drawn() -> None:
    images = bright_and_dark(40)
    some = few(images, 3, seed=0)
    assert some.labels.bincount().tolist() == [3, 3]
    assert some.sources != few(images, 3, seed=1).sources
    assert len(few(images, 99, seed=0)) == 40
    with pytest.raises(ValueError, match="shots=0 is not positive"):
        few(images, 0, seed=0)


def test_the_nearest_vote_by_their_cosine() -> None:
    x, y = torch.randn(30, 5).double(), torch.randn(4, 5).double()
    targets = F.one_hot(torch.arange(30) % 3, 3).double()
    found = neighbours(x, targets, y, k=7)
    for i in range(4):
        cosines = F.cosine_similarity(x, y[i : i + 1])
        near = cosines.argsort(descending=True)[:7]
        weights = (cosines[near] / 0.07).exp()
        torch.testing.assert_close(found[i], weights @ targets[near] / weights.sum())


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--keep=first", "keep='first' is none of best, last"),
        ("--patience=-1", "patience=-1 is negative"),
        ("--sample=some", "sample='some' is none of all, balanced"),
        ("--class-weights=odd", "class_weights='odd' is none of equal, balanced"),
        ("--shots=0", "shots=0 is not positive"),
    ],
)
def test_unknown_values_are_refused(
    flag: str, told: str, vitft: Vitft, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--out", tmp_path / "x", flag]
    assert told in vitft("finetune", *flags, code=2).stderr


def test_a_calibrated_head_is_the_same_head_at_its_temperature(
    vitft: Vitft, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--epochs=2", "--base", base, "--data", folder]
    vitft("finetune", *flags, "--out", tmp_path / "plain")
    vitft("finetune", *flags, "--out", tmp_path / "warm", "--calibrate")
    heads = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "warm")]
    found = summary(tmp_path / "warm")["temperature"]
    assert found != 1
    for key, value in heads[0].items():
        torch.testing.assert_close(heads[1][key] * found, value)
    for needs in ("--calibrate", "--patience=1"):
        told = vitft("finetune", *flags, "--out", tmp_path / "x", needs, "--val-fraction=0", code=2)
        assert f"{needs.split('=')[0]} needs validation images" in told.stderr


def test_what_the_frozen_features_are_worth_is_told_first(
    vitft: Vitft, base: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--adapter=lora", "--epochs=1", "--base", base, "--data", folder, "--out", out]
    done = vitft("finetune", *flags, "--shots=9", "--class-weights=balanced", "--sample=balanced")
    facts = summary(out)
    knn, probe = (facts[f"frozen_{name}_accuracy"] for name in ("knn", "probe"))
    assert f"frozen features: accuracy {knn:.2%} by nearest neighbours, {probe:.2%}" in done.stderr
    assert done.stderr.index("frozen features") < done.stderr.index("epoch ")
    assert facts["n_train"] == 27
    assert facts["kept_epoch"] == facts["epochs_done"] == 1
