"""Hostile files through every loader, and kills at any moment: what comes of them, by kind.

    python -m benchmarks.faults --inputs 12000 --kills 50

A *bad* end is a traceback, a hang, memory far beyond the file's size, an answer that is no number,
or a resumed run with other weights and no word. A good one is the right result, or one line that
tells what is wrong. Inputs are valid files changed in one to three ways: a value of their JSON, or
bytes. Everything is drawn from --seed.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TextIO, cast

import click
import torch
from PIL import Image

import adapters
from benchmarks.results import table, write_result
from recipes.compare import command as compare
from recipes.inspect import command as inspect
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.command.streams import Outliving
from vitft.files import read_tensors
from vitft.pictures.decode import read_image
from vitft.pictures.preprocess import Fit
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run

SECONDS = 10  # for one input
MEMORY = 2 * 2**30  # bytes beyond what a process has at its start
TINY = ViTConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, patch_size=4, image_size=8)
CPU = torch.device("cpu")
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 1e308, -1e-300, float("nan")),
    *(float("inf"), "", "x", "\x1b[2J\x00", "../..", "é" * 300, "(a+)+$", "wq", [], {}, [[]]),
    *([1, 2, 3], {"a": {"b": []}}, ["wq", None], [float("nan")] * 3, "9" * 5000),
]


class Hang(BaseException):
    """An input took too long."""


# changes of files


def changed_json(value: Any, rng: random.Random) -> Any:
    """Return JSON with one value replaced, removed, doubled or nested."""
    value = copy.deepcopy(value)
    place, key = value, None
    while isinstance(place, (dict, list)) and place:
        key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if key is None:
        return rng.choice(ODD)
    how = rng.random()
    if how < 0.15:
        del place[key]
    elif how < 0.25 and isinstance(place, dict):
        place[f"{key}{rng.choice('_ 0')}"] = place[key]
    elif how < 0.3:
        for _ in range(rng.choice((5, 2000))):
            place[key] = [place[key]]
    else:
        place[key] = copy.deepcopy(rng.choice(ODD))
    return value


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes of which some are flipped, cut off, zeroed, doubled or inserted."""
    found, how = bytearray(content), rng.randrange(5)
    at = rng.randrange(max(1, len(found)))
    if how == 0:
        for _ in range(rng.choice((1, 1, 8, 64))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del found[at:]
    elif how == 2:
        found[at : at + 64] = bytes(min(64, len(found) - at))
    elif how == 3:
        found[at:at] = found[at : at + 64]
    else:
        found[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    return bytes(found)


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header, or with numbers that are none."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if rng.random() < 0.3 and body:  # 0xff is no number in any format of floats
        at = 4 * rng.randrange(len(body) // 4)
        body[at : at + 4] = b"\xff\xff\xff\xff"
    elif rng.random() < 0.6 and "__metadata__" in header:
        own = header["__metadata__"]
        key = rng.choice([*own])
        try:
            own[key] = json.dumps(changed_json(json.loads(own[key]), rng))
        except ValueError:
            own[key] = str(rng.choice(ODD))
    else:
        header = changed_json(header, rng)
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + bytes(body)


def change(path: Path, rng: random.Random) -> None:
    """Change a file in one to three ways."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = path.read_bytes()
        try:
            if path.suffix == ".json" and rng.random() < 0.8:
                changed = json.dumps(changed_json(json.loads(content), rng)).encode()
            elif path.suffix == ".safetensors" and rng.random() < 0.7:
                changed = changed_tensors(content, rng)
            else:
                changed = changed_bytes(content, rng)
        except (ValueError, struct.error, LookupError, TypeError, RecursionError):
            changed = changed_bytes(content, rng) if content else b"x"
        path.write_bytes(changed)


# what reads them


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
    from vitft.pictures.images import Images

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
    run.restore()
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


def use_run(folder: Path) -> str:
    """Compare and inspect a run."""
    for command, arguments in (
        (compare, [str(folder), "--out", str(folder / "page.html")]),
        (inspect, [str(folder)]),
    ):
        told = StringIO()
        with redirect_stdout(cast(TextIO, Outliving(told))), redirect_stderr(StringIO()):
            # click keeps the names of the help option with the command
            command.main(arguments, standalone_mode=False, help_option_names=["-h", "--help"])
        if "\x1b" in told.getvalue() or "\x00" in told.getvalue():
            return "control characters"
    page = folder / "page.html"
    return "control characters" if page.exists() and "\x00" in page.read_text() else ""


KINDS = {
    "adapters": Kind(make_adapter, use_adapter),
    "bases": Kind(make_base, use_base),
    "pictures": Kind(make_picture, use_picture),
    "run states": Kind(make_state, use_state),
    "summaries": Kind(make_run, use_run),
}
SHARES = {"adapters": 0.5, "bases": 0.2, "pictures": 0.15, "run states": 0.08, "summaries": 0.07}


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


def work(kind: str, numbers: list[int], seed: int, pipe: Any) -> None:
    """Try inputs in a process of its own, which may die of one."""
    torch.set_num_threads(1)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + 8 * 2**30,) * 2)
    sys.stderr = StringIO()
    for number in numbers:
        pipe.send((number, None))
        folder = Path(mkdtemp()) / str(number)
        folder.mkdir()
        KINDS[kind].make(folder)
        rng = random.Random(f"{seed} {kind} {number}")
        change(rng.choice(sorted(p for p in folder.iterdir() if p.is_file())), rng)
        pipe.send((number, outcome(KINDS[kind].use, folder)))
        shutil.rmtree(folder.parent)
    pipe.send((None, None))


def outcomes(kind: str, n: int, seed: int) -> Iterator[tuple[int, str]]:
    """Yield how each of n inputs of a kind ends."""
    left, context = [*range(n)], get_context("fork")
    while left:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(kind, left, seed, theirs))
        process.start()
        theirs.close()
        current = left[0]
        while True:
            if not ours.poll(3 * SECONDS):
                process.kill()
                yield current, "hang"
                left = [i for i in left if i > current]
                break
            try:
                number, found = ours.recv()
            except EOFError:
                yield current, "died"
                left = [i for i in left if i > current]
                break
            if number is None:
                left = []
                break
            current = number
            if found is not None:
                yield number, found
        process.join()


# kills


def killed(command: list[str], out: Path, file: str, moments: int, seed: int) -> dict[str, int]:
    """Kill a command at random moments and go on with it; return how often it ended right."""
    vitft = [sys.executable, "-m", "vitft", *command]
    started = time.perf_counter()
    subprocess.run([*vitft, f"--out={out}/whole"], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    rng, ends = random.Random(seed), Counter[str]()
    for i in range(moments):
        place = out / str(i)
        process = subprocess.Popen(
            [*vitft, f"--out={place}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
        again = subprocess.run(
            [*vitft, f"--out={place}", "--resume"], check=False, capture_output=True, text=True
        )
        files = [sorted(p.glob(f"**/{file}")) for p in (out / "whole", place)]
        if again.returncode != 0 or len(files[0]) != len(files[1]):
            ends[f"status {again.returncode}: {again.stderr.strip()[-200:]}"] += 1
            continue
        same = all(starmap(equal, zip(*files, strict=True)))
        hidden = [p for p in place.glob("**/.*") if p.is_file() and p.name != ".lock"]
        ends["other weights" if not same else "files left" if hidden else "right"] += 1
        shutil.rmtree(place)
    return dict(ends)


def equal(one: Path, other: Path) -> bool:
    """Return whether two files hold the same tensors, to the bit."""
    a, b = (read_tensors(path)[0] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kills(n: int, seed: int) -> list[dict[str, Any]]:
    """Kill every command that trains, n times each."""
    out, common = Path(mkdtemp()), ["--data=shapes", "--limit=60", "--batch-size=20", "--epochs=2"]
    common += ["--save-seconds=0.05", "--seed=1"]
    small = ["--dim=16", "--hidden-dim=32", "--n-heads=2", "--n-layers=2"]
    base = out / "pretrain/whole/model.safetensors"
    commands = {
        "pretrain": (["pretrain", *common, *small], "model.safetensors"),
        "finetune": (
            ["finetune", "--adapter=lora", f"--base={base}", *common],
            "adapter_model.safetensors",
        ),
        "sweep": (
            ["sweep", "--adapter=lora", "--rank=1,2", "--lr=1e-3,1e-2", f"--base={base}", *common],
            "adapter_model.safetensors",
        ),
    }
    rows = []
    for name, (command, file) in commands.items():
        (out / name).mkdir()
        ends = killed(command, out / name, file, n, seed)
        rows.append(row(f"kills of {name}", Counter(ends)))
        click.echo(table(rows[-1:], COLUMNS), err=True)
    shutil.rmtree(out)
    return rows


COLUMNS = {"kind": "", **dict.fromkeys(("n", "right", "refused", "bad"), ","), "what": ""}


def row(kind: str, ends: Counter[str]) -> dict[str, Any]:
    """Return a row of the table."""
    good = ends["right"] + ends["refused"]
    bad = {end: n for end, n in ends.most_common() if end not in ("right", "refused")}
    return {
        "kind": kind,
        "n": ends.total(),
        "right": ends["right"],
        "refused": ends["refused"],
        "bad": ends.total() - good,
        "what": "; ".join(f"{n} {end}" for end, n in [*bad.items()][:6]),
        "ends": dict(ends),
    }


@click.command()
@click.option("--inputs", default=12_000, show_default=True, help="Hostile files in all.")
@click.option("--kills", "n_kills", default=50, show_default=True, help="Of each command.")
@click.option("--only", help="One kind of files.")
@click.option("--seed", default=0, show_default=True)
@click.option("--verbose", is_flag=True, help="Print each bad end.")
def main(inputs: int, n_kills: int, only: str | None, seed: int, verbose: bool) -> None:
    """Try all kinds, print a row for each, and write the result."""
    rows = []
    for kind, share in SHARES.items():
        if only in (None, kind):
            ends = Counter[str]()
            for number, end in outcomes(kind, round(inputs * share), seed):
                ends[end] += 1
                if verbose and end not in ("right", "refused"):
                    click.echo(f"{kind} {number}: {end}", err=True)
            rows.append(row(kind, ends))
            click.echo(table(rows[-1:], COLUMNS), err=True)
    if n_kills:
        rows += kills(n_kills, seed)
    if only is None:
        write_result("faults_cpu", rows, inputs=inputs, kills=n_kills, seed=seed)
    click.echo(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
