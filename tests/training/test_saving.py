"""When states are saved, what that costs the clock, and runs that cannot be saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_together import Group, ends, images
from vitft.optimizers.updates import NotFinite
from vitft.training import loop
from vitft.training.loop import train
from vitft.training.run import Run
from vitft.training.saving import save
from vitft.training.step import Step


class Clock:
    """Stands for the time module: a step takes a second, and saving a hundred."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.saved = 0.0, list[tuple[int, int, float]]()
        step = Step.__call__

        def slow_step(this: Step, *batches: Any) -> None:
            step(this, *batches)
            self.now += 1

        def slow_save(this: Run, name: str | None = None) -> None:
            self.saved.append((this.epoch, this.step, this.seconds))
            save(this, name)
            self.now += 100

        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(Step, "__call__", slow_step)
        monkeypatch.setattr(loop, "save", slow_save)

    def perf_counter(self) -> float:
        return self.now


def test_an_epochs_seconds_are_those_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    (run,) = Group(tmp_path, save_seconds=0.5).runs("run", [images(17)], [0], [1e-2])
    train(run)
    assert [row["seconds"] for row in run.history] == [3.0, 3.0]
    assert [row["images_per_second"] for row in run.history] == [17 / 3] * 2
    steps = [(epoch, step, float(step)) for epoch in (0, 1) for step in (1, 2, 3)]
    assert clock.saved == [(0, 0, 0.0), *steps, (2, 0, 0.0)]


@pytest.mark.parametrize(
    ("save_seconds", "steps"), [(2.0, [1, 4, 7]), (1.0, [1, 3, 5, 7]), (0.0, [])]
)
def test_a_state_is_saved_when_more_than_so_many_seconds_have_passed(
    tmp_path: Path, save_seconds: float, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    group = Group(tmp_path, save_seconds=save_seconds, epochs=1)
    (run,) = group.runs("run", [images(7 * 7)], [0], [1e-2])
    train(run)
    saved = [step for epoch, step, _ in clock.saved if epoch == 0 and step]
    assert saved == steps  # the first save, before any step, took long


def test_runs_share_the_time_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    group, data = Group(tmp_path), images(17)
    runs = group.runs("run", [data] * 3, [0, 1, 2], [1e-2] * 3)
    train(runs, group.join)
    assert [row["seconds"] for run in runs for row in run.history] == [1.0] * 6


@pytest.mark.parametrize("n_failing", [1, 2])
def test_a_run_that_cannot_be_saved_fails_alone(
    tmp_path: Path, n_failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, data = Group(tmp_path, save_seconds=1e-9), images(17)
    runs = group.runs("run", [data] * 2, [0, 1], [1e-2] * 2)

    def failing(run: Run, name: str | None = None) -> None:
        if run.step and run in runs[:n_failing]:
            raise NotFinite("not finite")
        save(run, name)

    monkeypatch.setattr(loop, "save", failing)
    if n_failing == 2:
        with pytest.raises(NotFinite, match="^not finite$"):
            train(runs, group.join)
    else:
        assert train(runs, group.join) == {runs[0]: "not finite"}
        assert len(runs[1].history) == 2


def test_runs_may_differ_in_the_factors_of_their_rates(tmp_path: Path) -> None:
    group, data = Group(tmp_path), images(17)
    made = {}
    for name in ("together", "alone"):
        made[name] = []
        for factor in (1.0, 8.0):
            group.options = {"lr_factors": {"lora_b": factor}}
            made[name] += group.runs(f"{name}{factor}", [data], [0], [1e-2])
    train(made["together"], group.join)
    for one, other in zip(made["together"], made["alone"], strict=True):
        train(other)
        torch.testing.assert_close(ends(one), ends(other), rtol=0, atol=1e-9)
    assert not torch.allclose(*map(ends, made["alone"]))
