"""What `pretrain` and `finetune` share: options, device, resuming, test figures, a run's files."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from vitft.augment import Augmentation
from vitft.data import ImageSet
from vitft.evaluate import evaluate
from vitft.files import write_bytes, write_json
from vitft.images import Images, limit, split
from vitft.model import VisionTransformer
from vitft.options import option
from vitft.report import write_report
from vitft.state import STATE
from vitft.train import Fit, Plan
from vitft.version import __version__

# What a run leaves beside config.json.
OUTPUTS = (
    STATE,
    "metrics.jsonl",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "summary.json",
    "report.html",
)
MAY_DIFFER = ("out", "device", "save_seconds")  # between a run's start and its resumption


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options that both training commands have."""

    data: str = option(
        help="Data set: a name that `vitft data` lists, "
        "or a folder with train/CLASS and test/CLASS."
    )
    out: str = option(help="Folder for what the run writes.")
    epochs: int = option(20, "Passes over the training images.")
    batch_size: int = option(128, "Images in a step.")
    lr: float | None = option(1e-3, "Highest learning rate.")
    weight_decay: float = option(0.05, "Decoupled weight decay of matrices.")
    optimizer: str = option("adamw", "adamw, adam or muon.")
    schedule: str = option("cosine", "Of the learning rate: cosine, linear, multistep or constant.")
    warmup: float = option(0.05, "Share of the run over which the learning rate rises.")
    clip: float = option(1.0, "Largest norm of the gradient; 0: any.")
    label_smoothing: float = option(0.0, "Probability that a target leaves to the other classes.")
    flip: bool = option(
        False, "Mirror half of the training images; wrong where left and right differ, as in signs."
    )
    shift: int = option(0, "Move training images by up to so many pixels.")
    min_area: float = option(1.0, "Cut training images to at least this share of their area.")
    mixup: float = option(0.0, "Share of training images blended with another.")
    cutmix: float = option(0.0, "Share of training images that get a rectangle of another.")
    val_fraction: float = option(0.1, "Share of the training images kept for validation; 0: none.")
    limit: int | None = option(None, "Use only so many training images, equally of each class.")
    seed: int = option(0, "Of everything random.")
    device: str = option("auto", "auto, cpu, cuda or mps.")
    precision: str = option("auto", "auto, fp32, or bf16 for computing in bfloat16.")
    compile: bool | None = option(
        None, "Compile the model first, a minute or so.  [default: on a GPU, for long runs]"
    )
    save_seconds: float = option(60.0, "Seconds between saved states, which --resume goes on from.")
    resume: bool = option(False, "Go on with the run in --out where it was stopped.")
    overwrite: bool = option(False, "Replace the run in --out.")


@dataclass(frozen=True)
class Splits:
    """Images to train on, to watch by, and to report on once."""

    train: Images
    validation: Images
    test: Images


def pick_device(name: str) -> torch.device:
    """Return the device by name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if name not in there:
        raise ValueError(f"unknown device {name!r}; choose from auto, {', '.join(there)}")
    if not there[name]:
        raise ValueError(f"device {name} is not there; use --device auto")
    return torch.device(name)


def pick_bf16(name: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16; "auto" says yes where the device has it in hardware.

    Raises:
        ValueError: neither auto, fp32 nor bf16.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"unknown precision {name!r}; choose from auto, fp32, bf16")
    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_compile(options: TrainOptions, n_train: int, device: torch.device) -> bool:
    """Return whether compiling the model wins its time back.

    On two CPU cores it takes a minute for every image size and saves 3 to 4 % of a step; on a GPU,
    where memory traffic limits the step, a run of a few minutes is long enough.
    """
    if options.compile is not None:
        return options.compile
    return device.type == "cuda" and options.epochs * n_train >= 5_000_000


def check_run(options: TrainOptions) -> Path:
    """Return the run's folder, once --resume and --overwrite allow its use; no file is touched yet.

    Raises:
        ValueError: a run stands there already, or there is none to resume, or it was started
            with other options.
        OSError: the folder cannot be written to.
    """
    folder = Path(options.out)
    if options.resume:
        check_same(options, folder)
    elif not options.overwrite and any((folder / name).exists() for name in OUTPUTS):
        raise ValueError(
            f"{folder} holds a run already; use --resume, --overwrite or another --out"
        )
    write_bytes(folder / ".vitft", b"")  # says at once if nothing can be written here
    (folder / ".vitft").unlink()
    return folder


def start_run(options: TrainOptions, folder: Path) -> None:
    """Write config.json and remove what an earlier run left.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_json(folder / "config.json", _written(options))
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def check_same(options: TrainOptions, folder: Path) -> None:
    """Check that there is a run to resume, and that it was started with these options.

    Raises:
        ValueError: there is none, or it was started with others.
    """
    if options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite removes it; choose one")
    config = folder / "config.json"
    if not config.is_file() or not (folder / STATE).is_file():
        raise ValueError(f"there is no run to resume in {folder}; start it without --resume")
    try:
        started = dict(json.loads(config.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is broken ({error}); start again with --overwrite") from error
    for name, value in _written(options).items():
        if name not in MAY_DIFFER and started.get(name) != value:
            raise ValueError(
                f"the run in {folder} was started with {name} {started.get(name)}, not {value}; "
                "resume it with the same options"
            )


def _written(options: TrainOptions) -> dict[str, Any]:
    """Return the options as they read when they come back from a file: lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return {name: value for name, value in values.items() if name not in ("resume", "overwrite")}


def make_splits(data: ImageSet, options: TrainOptions, device: torch.device) -> Splits:
    """Return training, validation and test images, held on `device` where they fit."""
    train, validation = split(data.train, fraction=options.val_fraction, seed=options.seed)
    if options.limit is not None:
        train = limit(train, options.limit, seed=options.seed)
    return Splits(train.to(device), validation.to(device), data.test.to(device))


def make_plan(
    options: TrainOptions, device: torch.device, sizes: tuple[tuple[int, float], ...] = ()
) -> Plan:
    """Return what `Fit` decides by."""
    augmentation = Augmentation(
        flip=options.flip,
        shift=options.shift,
        min_area=options.min_area,
        mixup=options.mixup,
        cutmix=options.cutmix,
    )
    same = (
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "optimizer",
        "schedule",
        "warmup",
        "clip",
        "label_smoothing",
        "seed",
        "save_seconds",
    )
    return Plan(
        **{name: getattr(options, name) for name in same},
        bf16=pick_bf16(options.precision, device),
        augmentation=augmentation,
        sizes=sizes,
    )


def train(
    model: VisionTransformer,
    splits: Splits,
    plan: Plan,
    options: TrainOptions,
    folder: Path,
    belongs: Sequence[str] = (),
) -> Fit:
    """Train the model in place, or go on where the run was stopped, and return the finished run.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; says how to go on.
    """
    if pick_compile(options, len(splits.train), model.head.weight.device):
        model.compile()
    fit = Fit(model, splits.train, splits.validation, plan, folder, belongs)
    if options.resume:
        fit.restore()
    else:  # only now, with everything checked, an earlier run may go
        start_run(options, folder)
    try:
        fit.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the state is saved in {folder}; the same command with --resume goes on"
        ) from None
    return fit


def finish(
    fit: Fit, splits: Splits, options: TrainOptions, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the test split, write summary.json and report.html, and return the summary."""
    model = fit.model
    model.resize(model.config.image_size)
    started = time.perf_counter()
    result = evaluate(model, splits.test, bf16=fit.plan.bf16)
    seconds = sum(row["seconds"] for row in fit.history)
    summary: dict[str, Any] = {
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "images_per_second": round(len(fit.history) and _n_images(fit) / max(seconds, 1e-9), 1),
        "seconds": round(seconds, 1),
        "test_seconds": round(time.perf_counter() - started, 1),
        "device": device_name(fit.device),
        "data": options.data,
        "n_train": len(splits.train),
        "n_validation": len(splits.validation),
        "n_test": len(splits.test),
        "seed": options.seed,
        **facts,
        "versions": {
            "python": platform.python_version(),
            "vitft": __version__,
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
    }
    write_json(folder / "summary.json", summary)
    write_report(
        folder / "report.html",
        title=f"{folder.name}: {options.data}",
        facts=summary,
        history=fit.history,
        classes=model.classes,
        image=splits.test.decode,
        labels=result.labels,
        probabilities=result.probabilities,
    )
    return summary


def device_name(device: torch.device) -> str:
    """Return what the device is called, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    )


def say(text: str) -> None:
    """Print a line for the person who waits, on standard error."""
    click.echo(text, err=True)


def _n_images(fit: Fit) -> float:
    return sum(row["images_per_second"] * row["seconds"] for row in fit.history)
