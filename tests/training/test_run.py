"""A run by itself: its rates, its order, what it writes, and when it is not finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.evaluate import evaluate
from vitft.evaluation.task import SingleLabel
from vitft.files import read_tensors, write_tensors
from vitft.optimizers.updates import NotFinite
from vitft.pictures.images import Images
from vitft.training.epochs import finish_epoch
from vitft.training.finite import check_finite
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore, save

CPU = torch.device("cpu")


def images(n: int) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 2).to(CPU)


def new_run(folder: Path, belongs: tuple[str, ...] = (), **options: Any) -> Run:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.0))
    plan = {"epochs": 4, "batch_size": 8, "lr": 0.5, "weight_decay": 0.0} | options
    return Run(model, images(20), images(6), Plan(**plan), folder, belongs)


def test_the_rate_of_a_step_is_that_of_its_middle(tmp_path: Path) -> None:
    run = new_run(tmp_path, schedule="linear", warmup=0.0)
    assert run.steps_per_epoch == 3
    rates = []
    for run.epoch in range(4):
        rates += [run.lr(step) for step in range(3)]
    assert rates == pytest.approx([0.5 * (1 - (i + 0.5) / 12) for i in range(12)])


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    run = new_run(tmp_path, seed=3)
    first = run.order()
    run.step = 2
    assert torch.equal(run.order(), first[16:])
    run.step, run.epoch = 0, 1
    second = run.order()
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert torch.equal(new_run(tmp_path, seed=3).order(), first)
    assert not torch.equal(new_run(tmp_path, seed=4).order(), first)


def test_seeds_and_epochs_never_give_one_order_twice(tmp_path: Path) -> None:
    seen = set()
    for seed in range(4):
        run = new_run(tmp_path, seed=seed)
        for run.epoch in range(4):
            seen.add(tuple(run.order().tolist()))
    assert len(seen) == 16


def test_finishing_an_epoch_reports_what_its_steps_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.epoch, run.step, run.seconds = 1, 3, 4.0
    run.totals += torch.tensor([30.0, 12.0, 20.0])
    run.updates.steps.restart(3)
    rate, found = run.lr(2), evaluate(run.model, run.validation)
    row = finish_epoch(run)
    assert row == {
        "epoch": 2,
        "train_loss": 1.5,
        "val_loss": found.loss,
        "val_accuracy": found.accuracy,
        **{f"val_{name}": value for name, value in found.figures.items()},
        "lr": rate,
        "images_per_second": 5.0,
        "seconds": 4.0,
    }
    assert run.history == [row]
    assert (run.epoch, run.step, run.seconds, run.totals.tolist()) == (2, 0, 0.0, [0.0] * 3)
    assert run.updates.steps.start == 0
    run.totals[2] = run.seconds = 1.0
    finish_epoch(run)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == run.history
    assert lines.endswith("}\n")


def test_without_validation_images_its_figures_are_null(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.validation = run.validation_inputs = images(0)
    train(run)
    assert {(row["val_loss"], row["val_accuracy"]) for row in run.history} == {(None, None)}


def broken(run: Run, *, loss: float = 1.0, weight: float = 1.0) -> None:
    run.seconds = 1.0
    run.totals += torch.tensor([20 * loss, 10.0, 20.0])
    with torch.no_grad():
        next(iter(run.trainable.values()))[0] = weight


@pytest.mark.parametrize("values", [{"loss": torch.inf}, {"weight": torch.nan}])
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "a smaller --lr than 0.5"),
        ({"clip": 0.0}, "a smaller --lr than 0.5 or --clip 1"),
        ({"bf16": True}, "a smaller --lr than 0.5 or --precision fp32"),
    ],
)
def test_a_loss_or_weight_that_is_not_finite_ends_an_epoch_with_a_remedy(
    tmp_path: Path, values: dict[str, float], options: dict[str, Any], remedy: str
) -> None:
    run = new_run(tmp_path, **options)
    broken(run, **values)
    what = "the loss is not finite up to" if "loss" in values else "'cls_token' is not finite after"
    message = rf"^{what} step 3 of 3 in epoch 1, at learning rate [\d.e-]+; try {remedy}$"
    run.step = 3
    for finish in (save, finish_epoch):
        with pytest.raises(NotFinite, match=message):
            finish(run)
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_not_finite_says_where_at_what_rate_and_what_to_try(
    tmp_path: Path,
) -> None:
    run = new_run(tmp_path, schedule="constant", warmup=0.0)
    run.epoch, run.step = 2, 1
    run.updates.steps.restart(1)
    for value in (1.0, torch.nan, 1.0):
        run.updates.steps.update(torch.tensor(value))
    message = (
        "^the gradient is not finite at step 3 of 3 in epoch 3, at learning rate 0.5; "
        r"try a smaller --lr than 0\.5$"
    )
    with pytest.raises(NotFinite, match=message):
        check_finite(run)
    with pytest.raises(NotFinite, match=message):
        save(run)
    assert not list(tmp_path.iterdir())


def test_a_state_that_knows_no_contents_goes_on_with_any(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.contents = None  # type: ignore[assignment]  # as earlier versions wrote it
    save(run)
    restore(new_run(tmp_path))


@pytest.mark.parametrize("change", ["images", "validation", "classes", "belongs"])
def test_a_run_on_something_else_does_not_go_on(tmp_path: Path, change: str) -> None:
    run = new_run(tmp_path, ("a base",))
    run.epoch = 1
    save(run)
    other = new_run(tmp_path, ("a base",))
    restore(other)
    assert other.epoch == 1
    other = new_run(tmp_path, ("another base",) if change == "belongs" else ("a base",))
    if change == "images":
        other = Run(other.model, images(18), other.validation, other.plan, tmp_path, ("a base",))
    if change == "validation":
        other = Run(other.model, other.train, images(4), other.plan, tmp_path, ("a base",))
    if change == "classes":
        other.model.classes = ["cat", "dog"]
        other = Run(other.model, other.train, other.validation, other.plan, tmp_path, ("a base",))
    message = (
        f"^the run in {tmp_path} was started on other images, classes or another base; "
        "put them back, or start again with --overwrite$"
    )
    with pytest.raises(ValueError, match=message):
        restore(other)


def test_a_run_goes_back_to_all_of_its_progress(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.epoch, run.step, run.seconds = 2, 1, 3.5
    run.history, run.draws = [{"epoch": 1}, {"epoch": 2}], [torch.get_rng_state()]
    run.totals += torch.tensor([1.0, 2.0, 3.0])
    save(run)
    torch.manual_seed(8)
    other = new_run(tmp_path)
    restore(other)
    for name in ("epoch", "step", "seconds", "history"):
        assert getattr(other, name) == getattr(run, name)
    assert torch.equal(other.draws[0], run.draws[0])
    assert torch.equal(other.totals, run.totals)
    other.updates.steps.update(torch.tensor(torch.nan))
    with pytest.raises(NotFinite, match="at step 2 of 3 in epoch 3"):
        check_finite(other)


@pytest.mark.parametrize("name", ["epoch", "step", "seconds", "history", "totals", "belongs"])
def test_a_state_without_its_progress_is_broken(tmp_path: Path, name: str) -> None:
    run = new_run(tmp_path)
    save(run)
    path = tmp_path / "state.safetensors"
    tensors, progress = read_tensors(path)
    del progress[name]
    for key in ("checksum", "best"):  # of what it was; as of version 0.1, which had neither
        progress.pop(key)
    write_tensors(path, tensors, progress)
    message = rf"^{path} is broken \(.* missing required field {name}\); start again with"
    with pytest.raises(ValueError, match=message):
        restore(run)


@pytest.mark.parametrize(
    ("name", "value"), [("epoch", -1), ("step", 1.5), ("totals", [1.0]), ("history", [{"lr": "x"}])]
)
def test_progress_of_another_type_or_range_is_named(
    tmp_path: Path, name: str, value: object
) -> None:
    run = new_run(tmp_path)
    save(run)
    tensors, progress = read_tensors(tmp_path / "state.safetensors")
    for key in ("checksum", "best"):  # of what it was; as of version 0.1, which had neither
        progress.pop(key)
    write_tensors(tmp_path / "state.safetensors", tensors, progress | {name: value})
    with pytest.raises(ValueError, match=rf"is broken \(its progress: {name}.*Expected"):
        restore(run)


def test_a_run_computes_in_bfloat16_where_its_plan_says_so(tmp_path: Path) -> None:
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with new_run(tmp_path, bf16=bf16).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_new_run_has_come_nowhere(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert (run.epoch, run.step, run.seconds, run.feature_seconds) == (0, 0, 0.0, 0.0)
    assert run.history == []
    assert run.totals.tolist() == [0.0] * 3
    message = "^recorded=True is for CUDA; the model is on cpu$"
    with pytest.raises(ValueError, match=message):
        new_run(tmp_path, recorded=True)


def test_an_epoch_is_validated_by_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def noted(*inputs: Any, **named: Any) -> Any:
        asked.append((inputs, named))
        return evaluate(*inputs, **named)

    monkeypatch.setattr("vitft.training.epochs.evaluate", noted)
    task = SingleLabel()
    run = new_run(tmp_path, task=task, bf16=True, epochs=1)
    train(run)
    assert asked == [((run.model, run.validation), {"task": task, "bf16": True})]
    assert asked[0][1]["task"] is task


def test_only_a_cpu_is_waited_for_before_a_step(tmp_path: Path) -> None:
    for kind, waits in (("cpu", True), ("cuda", False)):
        run = new_run(tmp_path)
        run.device = torch.device(kind)
        for p in run.trainable.values():
            p.grad = torch.full_like(p, torch.nan)
        if waits:
            with pytest.raises(NotFinite):
                run.update()
            assert all(p.isfinite().all() for p in run.trainable.values())
        else:
            run.update()  # which the end of the epoch finds out
