"""What a run survives: gradients that are not finite, and a batch too large for memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_loop import new_run, weights
from vitft.optimizers.updates import NotFinite
from vitft.training.forward import Pass
from vitft.training.loop import train
from vitft.training.run import Run


class Poisoned(Run):
    """A run some of whose steps get a gradient that is no number, and loss to match."""

    steps: tuple[int, ...] = (1, 4)
    taken = 0

    def update(self) -> bool:
        self.taken += 1
        if self.taken - 1 in self.steps:
            next(iter(self.trainable.values())).grad.fill_(torch.nan)
            self.totals[0] = torch.nan
        return super().update()


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path / "poisoned", kind=Poisoned, on_nan="skip", epochs=2)
    train(run)
    assert [row.get("skipped_steps", 0) for row in run.history] == [1, 1]
    assert "1 steps skipped: gradients not finite" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in weights(run).values())
    assert all(0 < row["train_loss"] < 10 for row in run.history)


def test_a_skipped_step_leaves_no_trace(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind=Poisoned, on_nan="skip", epochs=1)
    seen: list[dict[str, Tensor]] = []
    plain = run.update

    def update() -> bool:
        seen.append(weights(run))
        return plain()

    run.update = update  # type: ignore[method-assign]
    train(run)
    before, at, after = seen
    assert any(not torch.equal(before[name], at[name]) for name in before)
    for name, value in at.items():
        assert torch.equal(after[name], value)  # the second of three steps was skipped


def test_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind=Poisoned, on_nan="skip")
    run.steps = (0, 1)  # of three
    with pytest.raises(NotFinite, match="2 gradients are not finite up to step 3 of 3 in epoch 1"):
        train(run)


def test_by_default_the_first_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="the gradient is not finite at step 2 of 3 in epoch 1"):
        train(new_run(tmp_path, kind=Poisoned))


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let memory be enough for so many images at a time; return how many were tried."""
    plain, tried = Pass.forward, list[int]()

    def forward(self: Pass, x: Tensor) -> Tensor:
        tried.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(self, x)

    monkeypatch.setattr(Pass, "forward", forward)
    return tried


def test_a_batch_too_large_is_computed_in_parts_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-4}
    whole = new_run(tmp_path / "whole", **options)
    parts = new_run(tmp_path / "parts", auto_accumulate=True, **options)
    train(whole)
    tried = limited(monkeypatch, 5)
    train(parts)
    assert tried[:7] == [16, 8, 4, 4, 4, 4, 4]  # learned once
    assert max(tried[7:]) == 4
    told = capsys.readouterr().err
    assert "out of memory: a batch is computed in 4 parts from here on" in told
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, atol=2e-5, rtol=0)
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)


def test_what_no_part_is_small_enough_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        train(new_run(tmp_path / "parts", auto_accumulate=True))
    with pytest.raises(torch.OutOfMemoryError):
        train(new_run(tmp_path / "plain"))


def test_another_error_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Pass, x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Pass, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(new_run(tmp_path, auto_accumulate=True))
