"""Commands that write, and what they must leave, whatever happened to them.

A job is done once undisturbed. Afterwards, each time that something happened to it, the same
command goes on or is given again, and must leave the same.
"""

import importlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from time import perf_counter

import torch
from matplotlib.figure import Figure

from benchmarks.trouble import Before, Command, Ended, Events, nothing
from tests.families.sources import hf_model, timm_model
from tests.shared import TINY, TINY_FLAGS, paint
from vitft.command.help import COMMANDS
from vitft.data.named import import_torchvision
from vitft.families.onnx import write_onnx
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

TRAIN = ("--batch-size=8", "--epochs=2", "--save-seconds=0.001", "--device=cpu")
COLOURS = {"red": (200, 30, 40), "green": (30, 200, 40), "blue": (30, 40, 200)}
WEIGHTS, OVERWRITE = "*model.safetensors", "--overwrite"


@dataclass
class Job:
    """A command that writes.

    Attributes:
        arguments: without --out.
        out: the name of the file or folder that it writes.
        again: what goes on with it; "" of a command that is given again as it was.
        whole: where it has been done, undisturbed.
        seconds, n_events: that it took.
    """

    arguments: Sequence[object]
    out: str
    again: str = ""
    whole: Path = field(default_factory=Path)
    seconds: float = 0.0
    n_events: int = 0

    def begin(self, place: Path, before: Before = nothing, *more: str) -> Command:
        """Start the command in a place of its own."""
        return Command([*self.arguments, "--out", place / self.out, *more], before)

    def measure(self, place: Path) -> None:
        """Do it undisturbed.

        Raises:
            RuntimeError: it fails.
        """
        self.whole, events, started = place, Events(place), perf_counter()
        place.mkdir()
        done = self.begin(place, events.watch).end()
        if done.status:
            raise RuntimeError(f"{self.arguments} fails undisturbed: {done.said}")
        self.seconds, self.n_events = perf_counter() - started, events.n

    def verdict(self, place: Path, ended: Ended, *, go_on: bool = True) -> str:
        """Return "right", or what is bad about what it left, and leaves when it is given again.

        Args:
            place: where it ended.
            ended: how.
            go_on: whether to give it again.
        """
        if ended.fault or (found := self._left(place, ended)):
            return ended.fault or found
        if ended.status != 0 and go_on:
            there = (place / self.out).exists() and not self.again
            again = self.begin(place, nothing, *[self.again] * bool(self.again)).end()
            if OVERWRITE in again.said:  # its folder was lost, and part of it written again
                again = self.begin(place, nothing, OVERWRITE).end()
            if again.fault or again.status != (2 if there else 0):
                return f"given again: {again.fault or again.said.strip()[-200:]}"
        elif ended.status != 0:
            return "right"
        if not self.is_same(place):
            return "other weights" if self.again else "other bytes"
        return "temporary files left" if [*place.rglob(".*")] else "right"

    def _left(self, place: Path, ended: Ended) -> str:
        """Return what is bad about what a command has left that has not been given again."""
        left = [path for path in place.rglob(".*") if path.suffix != ".lock"]
        if ended.status != -signal.SIGKILL and left:
            return "temporary files left at once"
        whole = self.again or not (place / self.out).exists() or self.is_same(place)
        return "" if whole else "part of a file"

    def is_same(self, place: Path) -> bool:
        """Return whether the place holds what the undisturbed command left."""
        return self._contents(place) == self._contents(self.whole)

    def _contents(self, place: Path) -> dict[str, bytes]:
        """Return the files that are the same each time, by their names: of training, weights."""
        files = place.rglob(WEIGHTS if self.again else "*")
        found = {str(path.relative_to(place)): path for path in files if path.is_file()}
        shown = {name: path for name, path in found.items() if not f"/{name}".count("/.")}
        return {name: path.read_bytes() for name, path in shown.items()}


def ready() -> None:
    """Import what commands import, late ones too, so that those forked from here start at once.

    Their reports have no pictures, which take most of the time and are one write.
    """
    torch.set_num_threads(1)
    import_torchvision()
    for name in (*COMMANDS, "shared.peft_folder"):
        importlib.import_module(f"recipes.{name}")
    for name in ("matplotlib.pyplot", "timm", "transformers", "onnxruntime"):
        importlib.import_module(name)
    Figure.savefig = lambda self, file, **_: file.write("<svg/>")
    with TemporaryDirectory() as folder:
        write_onnx(VisionTransformer(ViTConfig(**TINY)), Path(folder, "warm.onnx"))


def pictures(folder: Path) -> Path:
    """Return a folder of pictures of three colours."""
    for name, (red, green, blue) in COLOURS.items():
        for i in range(12):
            paint(folder / "train" / name / f"{i}.png", (red + i, green, blue))
        paint(folder / "test" / name / "0.png", (red, green, blue + 1))
    return folder


def jobs(folder: Path) -> dict[str, Job]:
    """Return the commands that write, each done once in the folder."""
    base, adapter = folder / "pretrain/run/model.safetensors", folder / "finetune/run"
    train = [*TRAIN, f"--data={pictures(folder / 'pictures')}"]
    finetune = ["finetune", "--adapter=lora", f"--base={base}", *train]
    sweep = ["sweep", "--adapter=lora", "--rank=1,2", "--lr=1e-3,1e-2", f"--base={base}", *train]
    for library, make in (("hf", hf_model), ("timm", timm_model)):
        (folder / library).mkdir()
        make("vit", folder / library)
    model = [f"--base={base}", f"--adapter={adapter}"]
    found = {
        "pretrain": Job(["pretrain", *train, *TINY_FLAGS], "run", "--resume"),
        "finetune": Job(finetune, "run", "--resume"),
        "sweep": Job(sweep, "run", "--resume"),
        "convert": Job(["convert", folder / "hf"], "base.safetensors"),
        "merge": Job(["merge", *model], "merged.safetensors"),
        "export hf": Job(["export", "--format=hf", "--base", folder / "hf"], "back"),
        "export timm": Job(["export", "--format=timm", "--base", folder / "timm"], "back"),
        "export onnx": Job(["export", "--format=onnx", *model], "model.onnx"),
    }
    for name, job in found.items():
        job.measure(folder / name)
    return found


@contextmanager
def place_in(folder: Path) -> Iterator[Path]:
    """Make a place in a folder, which goes afterwards."""
    place = Path(mkdtemp(dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
