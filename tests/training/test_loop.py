import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
from tests.shared import TINY, some
from tests.training.test_draws import Normed
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.evaluate import evaluate
from vitft.files import read_tensors, write_tensors
from vitft.optimizers.build import OPTIMIZERS
from vitft.optimizers.updates import NotFinite
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore, save
from vitft.training.step import Step
from vitft.training.stop import Interrupted

CPU = torch.device("cpu")


def bright_and_dark(n: int) -> Images:
    """Return images whose class is whether they are bright."""
    labels = torch.arange(n) % 2
    pixels = (torch.randint(0, 120, (n, 3, 8, 8)) + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return Images(lambda i: pixels[i], labels).to(CPU)


def new_run(folder: Path, *, kind: type[Run] = Run, **options: Any) -> Run:
    """Return a run on 40 images, ready to start."""
    torch.manual_seed(1)
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.1))
    augmentation = Augmentation(flip=True, shift=1, mixup=0.2, cutmix=0.2)
    plan = Plan(
        **{
            "epochs": 3,
            "batch_size": 16,
            "lr": 3e-3,
            "weight_decay": 0.1,
            "augmentation": augmentation,
        }
        | options
    )
    folder.mkdir(exist_ok=True)
    return kind(model, bright_and_dark(40), bright_and_dark(10), plan, folder)


def weights(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note the epoch and step of every save."""
    places: list[tuple[int, int]] = []

    def save_and_note(run: Run, name: str | None = None) -> None:
        save(run, name)
        places.append((run.epoch, run.step))

    monkeypatch.setattr("vitft.training.loop.save", save_and_note)
    return places


def test_states_are_saved_by_the_clock_however_short_an_epoch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("vitft.training.loop.time.perf_counter", lambda: float(next(clock)))
    places = noted(monkeypatch)
    train(new_run(tmp_path, epochs=12, save_seconds=20.0))  # an epoch takes four ticks of the clock
    assert (places[0], places[-1]) == ((0, 0), (12, 0))
    assert 2 <= len(places[1:-1]) <= 4


def test_it_learns_and_writes_a_line_an_epoch(tmp_path: Path) -> None:
    run = new_run(tmp_path, epochs=12, augmentation=Augmentation())
    train(run)
    history = run.history
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == history
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "val_balanced_accuracy",
        "val_macro_f1",
        "val_calibration_error",
        "lr",
        "images_per_second",
        "seconds",
    ]
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["train_loss"] < 0.5 < rows[0]["train_loss"]
    assert rows[-1]["val_accuracy"] == evaluate(run.model, run.validation).accuracy > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop_at", some([1, 2, 3, 5], 3))
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: str, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"optimizer": optimizer, "weight_decay": 0.0, "sizes": ((4, 0.3),)}
    whole = new_run(tmp_path / "whole", **options)
    train(whole)
    stopped = new_run(tmp_path / "stopped", **options)
    step, n_steps = Step.__call__, 0

    def counting_step(self: Step, *batches: Any) -> None:
        nonlocal n_steps
        step(self, *batches)
        n_steps += 1
        if n_steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", counting_step)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        train(stopped)
    monkeypatch.undo()
    resumed = new_run(tmp_path / "stopped", **options)
    torch.manual_seed(99)
    restore(resumed)
    train(resumed)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    timed = ("seconds", "images_per_second")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timed} for row in rows]  # noqa: E731
    assert strip(resumed.history) == strip(whole.history)


def test_the_state_is_saved_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = noted(monkeypatch)
    train(new_run(tmp_path, save_seconds=1e-9))
    assert places == [(0, 0), *((epoch, step) for epoch in range(3) for step in (1, 2, 3)), (3, 0)]


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    save(run)
    run.model.new_head(("a", "b", "c"))
    with pytest.raises(ValueError, match="belongs to another model"):
        restore(run)


@pytest.mark.parametrize("missing", ["random.cpu", "totals", "optimizer.0.1.exp_avg"])
def test_a_state_that_lacks_something_is_refused(tmp_path: Path, missing: str) -> None:
    run = new_run(tmp_path, epochs=1)
    train(run)
    tensors, place = read_tensors(tmp_path / "state.safetensors")
    assert (tensors | place).pop(missing) is not None
    tensors.pop(missing, None)
    place.pop(missing, None)
    for name in ("checksum", "best"):  # of what it was; as of version 0.1, which had neither
        place.pop(name)
    write_tensors(tmp_path / "state.safetensors", tensors, place)
    with pytest.raises(ValueError, match=r"state\.safetensors is broken"):
        restore(run)


def test_only_what_trains_is_in_the_state(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    adapters.inject(run.model, adapters.LoRAConfig(rank=2), trainable=("head",))
    before = weights(run)
    run = Run(run.model, run.train, run.validation, run.plan, tmp_path)
    train(run)
    saved = {
        name[6:]
        for name in read_tensors(tmp_path / "state.safetensors")[0]
        if name.startswith("model.")
    }
    changed = {name for name, value in weights(run).items() if not torch.equal(value, before[name])}
    assert (
        changed == saved == {name for name in before if "lora" in name or name.startswith("head")}
    )


def test_validation_sees_no_augmentation(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Spy(Augmentation):
        def __call__(self, images: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            seen.append(run.model.training)
            return images, targets

    run = new_run(tmp_path, augmentation=Spy())
    train(run)
    assert seen == [True] * 9


def test_smaller_images_come_first(tmp_path: Path) -> None:
    plan = new_run(tmp_path, epochs=10, sizes=((4, 0.5), (6, 0.3))).plan
    assert [plan.image_size(epoch, 8) for epoch in range(10)] == [4] * 5 + [6] * 3 + [8] * 2
    short = new_run(tmp_path, epochs=2, sizes=((4, 0.9),)).plan
    assert [short.image_size(epoch, 8) for epoch in range(2)] == [4, 8]


def test_a_model_that_is_not_finite_does_not_begin(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    nn.init.constant_(run.model.head.weight, float("nan"))
    with pytest.raises(
        NotFinite, match="^'head.weight' is not finite before the first step; mend the base$"
    ):
        train(run)


def test_fewer_images_than_a_batch_train_too(tmp_path: Path) -> None:
    run = new_run(tmp_path, batch_size=64)
    train(run)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 is not positive"),
        ({"lr": float("nan")}, "lr=nan is not positive"),
        ({"weight_decay": -1}, "weight_decay=-1 is negative"),
        ({"seed": 2**32}, "seed=4294967296 is not in 0 <= seed"),
        ({"warmup": 1.0}, "warmup=1.0 is not in"),
        ({"schedule": "none"}, "unknown schedule 'none'; choose from cosine"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; choose from adamw"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adam has no weight_decay=0.1"),
    ],
)
def test_values_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        new_run(tmp_path, **options)


@pytest.fixture(autouse=True)
def _signals_are_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_broke_off_goes_on_from_its_state_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = new_run(tmp_path / "whole"), new_run(tmp_path / "broken")
    broken.model(torch.rand(2, 3, 8, 8)).sum().backward()  # somebody else's gradients
    train(whole)
    for value, error in ((torch.nan, NotFinite), (1.0, RuntimeError)):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "update", breaking(Run.update, 4, value))
            with pytest.raises(error):
                train(broken)
        assert all(p.grad is None for p in broken.model.parameters())
        restore(broken)
    train(broken)
    assert all(torch.equal(value, weights(broken)[name]) for name, value in weights(whole).items())


def breaking(plain: Callable[[Run], None], at: int, factor: float) -> Callable[[Run], None]:
    """Return an update whose gradients are times `factor` at a call, and which stops there."""
    calls = itertools.count(1)

    def update(run: Run) -> None:
        if stops := next(calls) == at:
            next(iter(run.trainable.values())).grad.mul_(factor)  # type: ignore[union-attr]
        if stops and factor == 1:
            raise RuntimeError("something else")
        plain(run)

    return update


def test_a_weight_that_is_not_finite_never_overwrites_a_good_state(tmp_path: Path) -> None:
    run = new_run(tmp_path, lr=1e38, warmup=0.0, weight_decay=0.0, save_seconds=1e-9)
    with pytest.raises(NotFinite, match="not finite after step 1 of 3 in epoch 1, at learning"):
        train(run)
    saved, _ = read_tensors(tmp_path / "state.safetensors")
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())


def test_the_random_numbers_of_others_go_on_as_if_nothing_was_trained(tmp_path: Path) -> None:
    run = new_run(tmp_path, epochs=1)
    before = torch.get_rng_state()
    train(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_that_training_changes_are_in_the_state(tmp_path: Path) -> None:
    def normed(n: int) -> Run:
        run = new_run(tmp_path, epochs=n, schedule="constant", warmup=0.0)
        run.model.patch_embed = nn.Sequential(run.model.patch_embed, Normed(nn.Identity()))
        return Run(run.model, run.train, run.validation, run.plan, tmp_path)

    run = normed(1)
    train(run)
    other = normed(2)
    restore(other)
    assert other.model.patch_embed[1].norm.num_batches_tracked == 3
    before, after = (r.model.patch_embed[1].norm.running_var for r in (run, other))
    assert torch.equal(before, after)
