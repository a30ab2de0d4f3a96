"""Files of every kind that vitft reads: valid ones made, changed ones used, and how that ends."""

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TextIO, cast

import click
import torch
from PIL import Image

import adapters
from recipes.compare import command as compare
from recipes.inspect import command as inspect
from recipes.shared.finetuning import FinetuneOptions, resolve
from recipes.shared.runs import read_config, typed_options
from tests.families.sources import hf_model, timm_model
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.command.streams import SafeStream
from vitft.pictures.decode import read_image
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit
from vitft.report.findings import Findings, Shown
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore

SECONDS = 10  # for one input
TINY = ViTConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, patch_size=4, image_size=8)
CPU = torch.device("cpu")
FOREIGN: dict[str, Callable[[str, Path], object]] = {
    **dict.fromkeys(("vit of classes", "dinov2", "dinov3", "clip", "siglip", "mae"), hf_model),
    **dict.fromkeys(("deit3", "dinov2 giant"), timm_model),
}


class Hang(BaseException):
    """An input took too long."""


@dataclass(frozen=True)
class Kind:
    """A kind of files: how to make valid ones in a folder, and what to do with changed ones."""

    make: Callable[[Path], None]
    use: Callable[[Path], str]  # returns "" or what is bad about the result


def tiny() -> VisionTransformer:
    """Return a tiny base, the same each time."""
    torch.manual_seed(0)
    model = VisionTransformer(TINY)
    model.classes = tuple("abcdefghij")
    return model


def images_for(model: VisionTransformer) -> torch.Tensor:
    """Return two images for a model."""
    return torch.zeros(2, model.config.n_channels, model.image_size, model.image_size)


def finite(model: VisionTransformer) -> str:
    """Return what is bad about a model's answer."""
    with torch.no_grad():
        return "" if model.eval()(images_for(model)).isfinite().all() else "NaN"


def make_adapter(folder: Path) -> None:
    """Save an adapter of a method that the folder's name picks."""
    names = [*adapters.METHODS]
    method = names[int(folder.name) % len(names)]
    model = adapters.inject(tiny(), adapters.METHODS[method](), trainable=("head",))
    adapters.save_adapter(model, folder)


def use_adapter(folder: Path) -> str:
    """Load an adapter and classify."""
    return finite(adapters.load_adapter(tiny(), folder))


def make_base(folder: Path) -> None:
    """Save a base."""
    save_model(tiny(), folder / "model.safetensors")


def use_base(folder: Path) -> str:
    """Load a base and classify."""
    return finite(load_model(folder / "model.safetensors"))


@cache
def foreign() -> list[Path]:
    """Return folders of other libraries' models, each written once."""
    root, found = Path(mkdtemp()), []
    for name, make in FOREIGN.items():
        folder = root / name
        folder.mkdir()
        make(name, folder)
        processor = {"size": {"height": 40, "width": 40}, "crop_size": 32, "do_center_crop": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        found.append(folder)
    return found


def make_foreign(folder: Path) -> None:
    """Write another library's model, which the folder's name picks."""
    folders = foreign()
    shutil.copytree(folders[int(folder.name) % len(folders)], folder, dirs_exist_ok=True)


def use_foreign(folder: Path) -> str:
    """Convert a model and classify."""
    return finite(load_model(folder))


def make_picture(folder: Path) -> None:
    """Save a picture in a format that the folder's name picks."""
    formats = ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm", "avif")
    kind = formats[int(folder.name) % len(formats)]
    pixels = torch.randint(0, 256, (24, 30, 3), dtype=torch.uint8).numpy()
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind)
    (folder / f"picture.{kind}").write_bytes(content.getvalue())


def use_picture(folder: Path) -> str:
    """Read a picture."""
    (path,) = folder.iterdir()
    image = read_image(path, Fit(16))
    return "" if image.shape == (3, 16, 16) and image.dtype == torch.uint8 else "shape"


def new_run(folder: Path) -> Run:
    """Return a short run."""
    pixels = torch.arange(16 * 3 * 64).view(16, 3, 8, 8).remainder(251).to(torch.uint8)
    images = Images(pixels.__getitem__, torch.arange(16) % 10).to(CPU)
    model = adapters.inject(tiny(), adapters.LoRAConfig(rank=2), trainable=("head",))
    plan = Plan(epochs=2, batch_size=8, lr=1e-3, weight_decay=0.0, save_seconds=0.0)
    return Run(model, images, images, plan, folder)


def make_state(folder: Path) -> None:
    """Leave the state of a run in its middle."""
    run = new_run(folder)
    run.is_done = lambda: run.epoch > 0  # type: ignore[method-assign]
    train(run)


def expected_weights() -> dict[str, torch.Tensor]:
    """Return what the run ends with if nothing is changed."""
    folder = Path(mkdtemp())
    run = new_run(folder)
    train(run)
    shutil.rmtree(folder)
    return {name: p.detach().clone() for name, p in run.trainable.items()}


EXPECTED: dict[str, torch.Tensor] = {}


def use_state(folder: Path) -> str:
    """Go on with a run."""
    if not EXPECTED:
        EXPECTED.update(expected_weights())
    run = new_run(folder)
    restore(run)
    train(run)
    same = all(torch.equal(run.trainable[name], value) for name, value in EXPECTED.items())
    return "" if same else "other weights"


def make_run(folder: Path) -> None:
    """Leave what a finished run leaves, and what reports are made of."""
    make_state(folder)
    adapters.save_adapter(new_run(Path(mkdtemp())).model, folder)
    summary = {
        **dict.fromkeys(("test_accuracy", "val_accuracy", "test_loss", "seconds"), 0.5),
        **dict.fromkeys(("n_parameters", "n_trainable", "seed", "file_bytes"), 7),
        **{"data": "x", "device": "cpu", "images_per_second": 3.0, "adapter": "lora"},
        "versions": {"vitft": "0.1"},
    }
    config = {"adapter": "lora", "base": "b", "data": "x", "out": "o", "lr": 0.1, "rank": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "state.safetensors").unlink()
    shown = [Shown("a.png", "a → b 90%", b"\x89PNG", b"")]
    counts = {"confusions": [(0, 1, 1)], "bins": [(1, 0.5, 0.0)], "wrong": 1}
    Findings(split="test", n=1, classes=["a", "b"], mistakes=shown, **counts).write(folder)


def use_run(folder: Path) -> str:
    """Compare and inspect a run, and read what its report shows and how it goes on."""
    Findings.read(folder)
    needed = {"adapter": "lora", "base": "b", "data": "x", "out": "o"}
    given = needed | typed_options(read_config(folder, "go on with"), FinetuneOptions)
    resolve(FinetuneOptions(**given), CPU)
    for command, arguments in (
        (compare, [str(folder), "--out", str(folder / "page.html")]),
        (inspect, [str(folder)]),
    ):
        told = StringIO()
        with redirect_stdout(cast(TextIO, SafeStream(told))), redirect_stderr(StringIO()):
            # click keeps the names of the help option with the command
            command.main(arguments, standalone_mode=False, help_option_names=["-h", "--help"])
        if "\x1b" in told.getvalue() or "\x00" in told.getvalue():
            return "control characters"
    page = folder / "page.html"
    return "control characters" if page.exists() and "\x00" in page.read_text() else ""


KINDS = {
    "adapters": Kind(make_adapter, use_adapter),
    "bases": Kind(make_base, use_base),
    "other libraries' bases": Kind(make_foreign, use_foreign),
    "pictures": Kind(make_picture, use_picture),
    "run states": Kind(make_state, use_state),
    "summaries": Kind(make_run, use_run),
}


def outcome(use: Callable[[Path], str], folder: Path) -> str:
    """Return "right", "refused", or what is bad about how an input ended."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        return use(folder) or "right"
    except Hang:
        return "hang"
    except MemoryError:
        return "out of memory"
    except (ValueError, OSError, click.ClickException) as error:
        return "refused" if str(error) or isinstance(error, click.ClickException) else "no word"
    except RuntimeError as error:
        full = "allocate memory" in str(error)
        return "out of memory" if full else f"{type(error).__name__}: {str(error)[:100]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
