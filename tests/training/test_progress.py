"""What a person sees of a training run: bars, the loss so far, a line an epoch."""

import itertools
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.features import extract
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.progress import epoch_line, show
from vitft.training.run import Run

CPU = torch.device("cpu")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def standard_error(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> StringIO:
    """Return what stands for standard error from here on: a terminal, or a file."""
    stream = Terminal() if terminal else StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def images(n: int) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 2).to(CPU)


def new_run(folder: Path, n: int = 40, **options: Any) -> Run:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.0))
    plan = {"epochs": 3, "batch_size": 16, "lr": 1e-3, "weight_decay": 0.0} | options
    return Run(model, images(n), images(4), Plan(**plan), folder)


@pytest.mark.parametrize("terminal", [True, False])
def test_frozen_stages_show_how_many_images_they_saw_on_a_terminal_only(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = standard_error(monkeypatch, terminal=terminal)
    model = VisionTransformer(ViTConfig(**TINY))
    extract(model, images(12), 2, folder=tmp_path, batch_size=5)
    if terminal:
        last = shown.getvalue().split("\r")[-1]
        assert re.search(r"^frozen stages: 100%\|.*\| 12/12 \[.* images/s\]$", last.strip())
    else:
        assert shown.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_training_counts_images_on_a_terminal_and_writes_a_line_an_epoch_anywhere(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = standard_error(monkeypatch, terminal=terminal)
    run = new_run(tmp_path, n=400, batch_size=200)
    train(run)
    written = shown.getvalue()
    lines = [line for line in re.split(r"[\r\n]", written) if line.startswith("epoch ")]
    assert lines == [epoch_line(row) for row in run.history]
    if terminal:
        assert re.search(r"100%\|.*\| 1200/1200 \[.* images/s", written)
    else:
        assert written.splitlines() == lines


def test_a_bar_goes_on_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    run.epoch, run.step = 1, 2
    run.totals += torch.tensor([20.0, 30.0, 32.0])
    shown = standard_error(monkeypatch, terminal=True)
    train(run)
    assert "60%|" in shown.getvalue()
    assert "| 72/120 [" in shown.getvalue()
    assert "| 120/120 [" in shown.getvalue()


def test_the_loss_and_accuracy_so_far_stand_beside_the_bar(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.epoch, run.totals = 1, torch.tensor([20.0, 30.0, 32.0])
    bar = tqdm(total=3, file=StringIO())
    show(run, bar)
    assert bar.postfix == "epoch 2/3, loss 0.625, accuracy 93.8%"
    bar.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_looked_at_every_half_second_where_somebody_sees_it(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looked = itertools.count(0.0, 0.2), []
    monkeypatch.setattr("vitft.training.loop.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("vitft.training.loop.show", lambda run, bar: looked.append(run.step))
    standard_error(monkeypatch, terminal=terminal)
    train(new_run(tmp_path, n=16 * 10, epochs=1))
    assert looked == ([3, 6, 9] if terminal else [])


ROW = {
    "epoch": 7,
    "train_loss": 1.23456,
    "val_loss": 0.98765,
    "val_accuracy": 0.87654,
    "lr": 1e-3,
    "images_per_second": 12345.6,
    "seconds": 9.87,
}


def test_an_epoch_is_one_line() -> None:
    assert epoch_line(ROW) == (
        "epoch   7  loss 1.235  validation 0.988, accuracy 87.65%  12,346 images/s, 9.9 s"
    )
    without = ROW | {"val_loss": None, "val_accuracy": None}
    assert epoch_line(without) == "epoch   7  loss 1.235  12,346 images/s, 9.9 s"
