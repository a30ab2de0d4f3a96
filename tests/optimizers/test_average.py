"""An average of the weights is what is validated and kept, where the plan says so."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.test_loop import new_run, weights
from vitft.evaluation.evaluate import evaluate
from vitft.optimizers.average import Average
from vitft.training.loop import train
from vitft.training.run import Run
from vitft.training.saving import restore


def test_it_is_the_moving_average_that_the_formula_tells() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    average = Average({"w": parameter}, decay=0.3)
    expected = None
    for t in range(1, 9):
        with torch.no_grad():
            parameter.normal_()
        average.update(t)
        decay = min(0.3, (1 + t) / (10 + t))
        w = parameter.detach().clone()
        expected = w if expected is None else decay * expected + (1 - decay) * w
        torch.testing.assert_close(average.values["w"], expected)


def test_the_model_gets_its_own_weights_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    average = Average({"w": parameter}, decay=0.5)
    average.values = {"w": torch.full((2,), 7.0)}
    with average.applied():
        assert parameter.tolist() == [7, 7]
    assert parameter.tolist() == [1, 1]


class Noting(Run):
    """A run that keeps its weights after every step."""

    def update(self) -> bool:
        skipped = super().update()
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in weights(self).items()}]
        return skipped


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_validates_and_keeps_the_average(keep: str, tmp_path: Path) -> None:
    plain = new_run(tmp_path / "plain", keep=keep)
    run = new_run(tmp_path / "ema", keep=keep, ema=0.9, kind=Noting)
    train(plain)
    train(run)
    average = run.seen[0]
    for t, w in enumerate(run.seen[1:], start=1):
        decay = min(0.9, (1 + t) / (10 + t))
        average = {k: decay * average[k] + (1 - decay) * w[k] for k in w}
    if keep == "last":
        for name, value in weights(run).items():
            torch.testing.assert_close(value, average[name])
    assert evaluate(run.model, run.validation).loss == run.kept["val_loss"]
    losses = [[row["train_loss"] for row in one.history] for one in (plain, run)]
    assert losses[0] == losses[1]  # it changes nothing of the steps
    assert plain.history[-1]["val_loss"] != run.history[-1]["val_loss"]


def test_it_survives_a_stop(tmp_path: Path) -> None:
    whole = new_run(tmp_path / "whole", ema=0.9, keep="last")
    train(whole)
    first = new_run(tmp_path / "parts", ema=0.9, keep="last")
    first.is_done = lambda: first.epoch >= 1  # type: ignore[method-assign]
    train(first)
    again = new_run(tmp_path / "parts", ema=0.9, keep="last")
    restore(again)
    assert again.epoch == 1
    train(again)
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value)
