"""Several runs that train in one pass: each ends where it does alone, and fails alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters
from tests.shared import TINY, some
from vitft import VisionTransformer, ViTConfig
from vitft.optimizers.updates import NotFinite
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training import loop, saving
from vitft.training.epochs import finish_epoch
from vitft.training.gradients import add_gradients, group_runs
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import finish_save, restore
from vitft.training.state import NEXT
from vitft.training.step import Step

CPU = torch.device("cpu")
PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 7, "lr": 1e-2, "weight_decay": 0.1}


def images(n: int, seed: int = 0) -> Images:
    pixels = torch.randint(
        0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Images(lambda i: pixels[i], torch.arange(n) % 3).to(CPU)


class Group:
    """A base, and runs of adapters on it that are alike each time they are made."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.base = VisionTransformer(ViTConfig(**TINY, n_classes=3, dropout=0.0)).double()
        self.folder, self.options = folder, options

    def runs(self, name: str, sets: list[Images], seeds: list[int], lrs: list[float]) -> list[Run]:
        made = []
        for i, (data, seed, lr) in enumerate(zip(sets, seeds, lrs, strict=True)):
            torch.manual_seed(i)
            model = adapters.shared_copy(self.base)
            config = adapters.LoRAConfig(rank=2, layers=(1,))
            adapters.inject(model, config, trainable=("head",))
            plan = Plan(**PLAN | self.options | {"seed": seed, "lr": lr})
            out = self.folder / f"{name}{i}"
            out.mkdir(exist_ok=True)
            made.append(Run(model, data, images(6, 9), plan, out))
        return made

    def join(self, models: list[VisionTransformer]) -> VisionTransformer:
        return adapters.together(self.base, models)


def ends(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.trainable.values()])


def measured(run: Run) -> list[float]:
    return [row[name] for row in run.history for name in ("train_loss", "val_loss", "lr")]


OPTIONS: list[dict[str, Any]] = [
    {"accumulate": 3, "label_smoothing": 0.3},
    {"n_cached": 1},
    {"augmentation": Augmentation(flip=True, shift=2, mixup=0.5)},
    {"n_cached": 2},
]


@pytest.mark.parametrize(
    ("options", "n_threads"), [({}, 1), *((options, 2) for options in some(OPTIONS, 2))], ids=str
)
def test_runs_end_where_each_does_alone(
    tmp_path: Path, options: dict[str, Any], n_threads: int
) -> None:
    torch.set_num_threads(n_threads)
    group, (a, b) = Group(tmp_path, **options), (images(17), images(17, seed=1))
    made = [[a, a, b, a], [0, 0, 0, 1], [1e-2, 3e-3, 1e-2, 1e-2]]
    together, alone = group.runs("together", *made), group.runs("alone", *made)
    assert train(together, group.join) == {}
    for one, other in zip(together, alone, strict=True):
        assert train(other) == {}
        torch.testing.assert_close(ends(one), ends(other), rtol=0, atol=1e-9)
        assert measured(one) == pytest.approx(measured(other), abs=1e-7)
        assert all(row["images_per_second"] > 0 for row in one.history)
        assert one.history[-1]["val_accuracy"] == other.history[-1]["val_accuracy"]
        assert [torch.equal(x, y) for x, y in zip(one.draws, other.draws, strict=True)] == [True]


@pytest.mark.parametrize(("at", "save_seconds"), [(1, 60.0), (2, 1e-9), (3, 60.0), (5, 1e-9)])
def test_a_run_that_fails_is_left_out_and_named_while_the_others_go_on(
    tmp_path: Path, at: int, save_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, data = Group(tmp_path, save_seconds=save_seconds), images(17)
    made = [[data] * 3, [0, 1, 0], [1e-2, 1e-2, 3e-3]]
    together, alone = group.runs("together", *made), group.runs("alone", *made)
    break_at(at, [together[1]], monkeypatch)
    failed = train(together, group.join)
    assert list(failed) == [together[1]]
    step, epoch = (at - 1) % 3 + 1, (at - 1) // 3 + 1
    assert f"not finite at step {step} of 3 in epoch {epoch}, at" in failed[together[1]]
    assert ends(together[1]).isfinite().all()
    for i in (0, 2):
        train(alone[i])
        torch.testing.assert_close(ends(together[i]), ends(alone[i]), rtol=0, atol=1e-9)
        assert len(together[i].history) == 2
    assert len(together[1].history) == epoch - 1


def break_at(step: int, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradients of these runs be infinite in their step of this number, from 1."""
    plain: Callable[[Run], None] = Run.update
    taken = dict.fromkeys(runs, 0)

    def update(self: Run) -> None:
        if self in taken:
            taken[self] += 1
            if taken[self] == step:
                next(iter(self.trainable.values())).grad.fill_(torch.inf)  # type: ignore[union-attr]
        plain(self)

    monkeypatch.setattr(Run, "update", update)


def test_a_run_whose_weight_alone_is_not_finite_keeps_its_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, data = Group(tmp_path, save_seconds=1e-9), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    plain = Run.update

    def update(self: Run) -> None:
        plain(self)
        if self is runs[1] and (self.epoch, self.step) == (0, 1):
            with torch.no_grad():
                next(iter(self.trainable.values())).fill_(torch.inf)

    monkeypatch.setattr(Run, "update", update)
    assert [*train(runs, group.join)] == [runs[1]]
    assert len(runs[0].history) == 2
    restore(runs[1])
    assert (runs[1].epoch, runs[1].step) == (0, 1)
    assert ends(runs[1]).isfinite().all()


@pytest.mark.parametrize("at", [[2, 2], [2, 3], [2, 5]])
def test_where_every_run_fails_training_does(
    tmp_path: Path, at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, data = Group(tmp_path), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    for step, run in zip(at, runs, strict=True):
        break_at(step, [run], monkeypatch)
    where = f"step {(at[1] - 1) % 3 + 1} of 3 in epoch {(at[1] - 1) // 3 + 1}"
    with pytest.raises(NotFinite, match=f"the gradient is not finite at {where}"):
        train(runs, group.join)


def test_where_the_last_run_fails_at_the_end_of_an_epoch_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, data = Group(tmp_path), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    break_at(2, runs[:1], monkeypatch)

    def finish(run: Run) -> dict[str, Any]:
        if run is runs[1]:
            raise NotFinite("the loss is nan")
        return finish_epoch(run)

    monkeypatch.setattr("vitft.training.loop.finish_epoch", finish)
    with pytest.raises(NotFinite, match="^the loss is nan$"):
        train(runs, group.join)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_every_run_is_in_one_pass_and_passes_are_of_about_one_size(n: int, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    for batch_size in (1, 8, 64):
        groups = group_runs(CPU, n, batch_size, whole=False)
        assert [i for group in groups for i in group] == list(range(n))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert group_runs(CPU, n, batch_size, whole=True) == [range(n)]
        assert group_runs(torch.device("meta"), n, batch_size, whole=False) == [range(n)]
        if batch_size == 64:
            assert len(groups) == n
        if batch_size == 1:
            assert len(groups) == 1


def test_runs_of_one_seed_on_one_set_share_a_prepared_batch(tmp_path: Path) -> None:
    group, (a, b) = Group(tmp_path), (images(17), images(17, seed=1))
    runs = group.runs("run", [a, b, a, a, b], [0, 0, 1, 0, 0], [1e-2] * 5)
    step = Step(runs, group.join)
    assert step.leaders == runs[:3]
    assert step.set_of == [0, 1, 2, 0, 1]


REFUSED: list[tuple[Callable[[list[Run]], None], str]] = [
    (lambda runs: setattr(runs[1], "step", 1), "must be at one step, on sets of equal size"),
    (lambda runs: setattr(runs[1], "epoch", 1), "must be at one step, on sets of equal size"),
    (lambda runs: setattr(runs[1], "train", images(16)), "on sets of equal size"),
    (lambda runs: runs[1].model.new_head(("a", "b")), "other trainable parameters"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_runs_that_stand_elsewhere_are_refused(
    tmp_path: Path, change: Callable[[list[Run]], None], message: str
) -> None:
    group, data = Group(tmp_path), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    change(runs)
    with pytest.raises(ValueError, match=message):
        train(runs, group.join)


def test_blocks_of_several_runs_are_not_computed_again(tmp_path: Path) -> None:
    group, data = Group(tmp_path, checkpoint_blocks=True), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    message = (
        "^several runs cannot train compiled, recorded, with checkpoint_blocks or with patience$"
    )
    with pytest.raises(ValueError, match=message):
        train(runs, group.join)


def test_runs_that_are_not_alike_are_refused_in_whole_sentences(tmp_path: Path) -> None:
    group, data = Group(tmp_path), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2, 1e-2])
    with pytest.raises(ValueError, match="^there is no run to train$"):
        train([], group.join)
    with pytest.raises(ValueError, match="^2 runs need join, which makes one model of theirs$"):
        train(runs)
    runs[1].step = 1
    message = "^runs that train together must be at one step, on sets of equal size$"
    with pytest.raises(ValueError, match=message):
        train(runs, group.join)
    group.options = {"clip": 0.5}
    other = group.runs("other", [data], [0], [1e-2])
    message = "^plans of runs that train together may differ in lr and seed only$"
    with pytest.raises(ValueError, match=message):
        train([runs[0], *other], group.join)


def test_gradients_that_stay_are_contiguous_and_nobody_elses() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in "ab"}
    turned, plain = torch.randn(3, 2).T, torch.randn(2, 3)
    add_gradients(weights, [turned, plain])
    assert weights["a"].grad.is_contiguous()
    assert torch.equal(weights["a"].grad, turned)
    assert weights["b"].grad is plain


@pytest.mark.parametrize("killed_in", ["save", "confirm"])
def test_runs_killed_while_they_are_saved_go_on_from_one_step(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, save_seconds=1e-9)
    given = [images(17)] * 2, [0, 0], [1e-2, 3e-3]
    whole = group.runs("whole", *given)
    train(whole, group.join)
    plain, n_calls = getattr(saving, killed_in), iter(range(100))

    def dying(run: Run, *arguments: str) -> None:
        if next(n_calls) == (5 if killed_in == "confirm" else 7):  # the second one's third
            raise KeyboardInterrupt
        plain(run, *arguments)

    monkeypatch.setattr(loop, killed_in, dying)
    with pytest.raises(KeyboardInterrupt):
        train(group.runs("cut", *given), group.join)
    monkeypatch.setattr(loop, killed_in, plain)
    again = group.runs("cut", *given)
    assert any((run.folder / NEXT).exists() for run in again)
    finish_save([run.folder for run in again])
    assert not any((run.folder / NEXT).exists() for run in again)
    for run in again:
        restore(run)
    assert {(run.epoch, run.step) for run in again} == {(0, 3 if killed_in == "confirm" else 2)}
    train(again, group.join)
    for one, other in zip(again, whole, strict=True):
        assert torch.equal(ends(one), ends(other))
