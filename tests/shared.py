"""What the tests share: a tiny model, a tiny folder of images, the command line as a process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import MagicMock

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vitft.command.cli import main
from vitft.data.named import import_torchvision
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

import_torchvision()  # before PEFT does, which gives up where the operators do not fit

TINY = {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2, "patch_size": 4, "image_size": 8}
TINY_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


# what takes long: make families
ALL = "VITFT_ALL" in os.environ
long = pytest.mark.long  # seconds: make long
slow = pytest.mark.skipif(not ALL, reason="takes long: make families")


def some(cases: Sequence[Any], step: int) -> list[Any]:
    """Return every `step`-th case for the whole suite; `make families` tries all of them."""
    return [*cases][:: 1 if ALL else step]


torch.set_num_threads(1)  # fixtures of modules are made before those of functions


@pytest.fixture(scope="session", autouse=True)
def _empty_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFT_DATA", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> VisionTransformer:
    """Return a tiny model in float64, every parameter random and not zero."""
    model = VisionTransformer(ViTConfig(**TINY, n_classes=3, dropout=0.0)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


DRAWING = {name: getattr(Figure, name) for name in ("add_axes", "savefig", "subplots")}
BLANK = {
    "add_axes": MagicMock(),
    "savefig": lambda _, file, **__: file.write("<svg></svg>"),
    "subplots": MagicMock(),
}


@contextmanager
def drawing(how: dict[str, Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, method in how.items():
            patch.setattr(Figure, name, method)
        yield


def drawn() -> AbstractContextManager[None]:
    """Draw the pictures of reports: without it a test draws none, since they take most of the time
    of a tiny run. What runs in another process draws them anyway.
    """
    return drawing(DRAWING)


@pytest.fixture
def draws() -> Iterator[None]:
    """Draw the pictures of reports, for one test."""
    with drawn():
        yield


@pytest.fixture(scope="session", autouse=True)
def _undrawn() -> Iterator[None]:
    with drawing(BLANK):
        yield


@pytest.fixture(scope="session", autouse=True)
def _quicker() -> Iterator[None]:
    """Force nothing to the disk; keep no traceback of each seed for a GPU that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for device in (torch.cuda, torch.xpu):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda _: None)
        yield


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of red, green and blue images, 20 a class to train on and 4 to test on."""
    root = tmp_path_factory.mktemp("colours")
    for channel, name in enumerate(("red", "green", "blue")):
        for split, n in (("train", 20), ("test", 4)):
            for i in range(n):
                other = int(split == "test")  # no image stands in both splits
                colour = [20 + i, 30 + other, 40 + other]
                colour[channel] = 200 + 2 * i
                paint(root / split / name / f"{i:03}.png", tuple(colour))
    return root


def command_line(arguments: Sequence[object], out: TextIO, err: TextIO) -> Any:
    """Run the command line in this process, since importing torch takes long; return its status."""
    handler, argv = signal.getsignal(signal.SIGTERM), sys.argv
    sys.argv = ["vitft", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return stop.value.code


@pytest.fixture(scope="session")
def vitft() -> Run:
    """Return a function that runs the command line and expects its status."""

    def run(*arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        out, err = StringIO(), StringIO()
        status = command_line(arguments, out, err)
        done = subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
        assert status == code, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def base(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base that tells red, green and blue apart."""
    out = tmp_path_factory.mktemp("recipes") / "base"
    flags = ["--epochs=12", "--batch-size=8", "--lr=3e-3", *TINY_FLAGS]
    vitft("pretrain", "--data", folder, "--out", out, *flags)
    return out / "model.safetensors"


@pytest.fixture(scope="session")
def run(vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter for that base, fine-tuned on the same images."""
    out = tmp_path_factory.mktemp("recipes") / "run"
    flags = ["--adapter=lora", "--epochs=3", "--batch-size=8"]
    vitft("finetune", "--base", base, "--data", folder, "--out", out, *flags)
    return out


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values
