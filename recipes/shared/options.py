"""The options of both training commands in; the device, the precision and the plan out."""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from vitft.command.options import check_numbers, option
from vitft.data.listing import TEST_FRACTION
from vitft.devices.processes import local_device, n_processes
from vitft.pictures.augment import Augmentation
from vitft.training.loggers import LOGGERS
from vitft.training.plan import Plan

VAL_FRACTION = 0.1  # of the training images of a set without a validation split


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of every command that reads labelled images."""

    data: str = option(
        help="A name that `vitft data` lists; a folder with train, val and test, each with "
        "CLASS/*, or with CLASS/* alone; or a CSV, TSV or Parquet file with path,label[,split]."
    )
    test_fraction: float | None = option(
        None,
        "Share of each class held out as the test split, if DATA has none.  "
        f"[default: {TEST_FRACTION} if DATA has no splits at all, else none]",
    )
    source_pattern: str | None = option(
        None,
        "Regular expression whose first group, found in a file's path, names the source of the "
        "picture: a patient, a video.  No source is in two splits.  "
        "[default: TRACK of files called TRACK_NUMBER]",
    )
    skip_broken: bool = option(False, "Leave out pictures that cannot be read, and say how many.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """The options that both training commands have.

    Raises:
        ValueError: a number is not finite, or too large to compute with.
    """

    out: str = option(help="Folder for what the run writes.")
    epochs: int = option(20, "Passes over the training images.")
    batch_size: int = option(128, "Images in a step.")
    accumulate: int = option(
        1, "Compute a batch in this many parts, one after another: less memory, the same result."
    )
    auto_batch: bool = option(
        False, "If a batch does not fit into memory, compute it in more parts: the same result."
    )
    checkpoint_blocks: bool = option(
        False, "Compute the blocks again in the backward pass: less memory, more time."
    )
    sizes: tuple[str, ...] = option(
        (),
        "Train on smaller images first: SIZE:SHARE of the epochs, for example 16:0.6,24:0.3 for "
        "32 pixels; less time, nearly the same result.",
    )
    lr: float | None = option(1e-3, "Highest learning rate.")
    weight_decay: float = option(0.05, "Decoupled weight decay of matrices.")
    optimizer: str = option(
        "adamw", "adamw, adam, or muon, which suits full weight matrices, not low-rank ones."
    )
    layer_decay: float = option(
        1.0,
        "Multiply a block's learning rate by this once for every later block (arXiv:2106.08254), "
        "for example 0.75 for full fine-tuning.",
    )
    schedule: str = option(
        "cosine", "Learning rate schedule: cosine, linear, multistep or constant."
    )
    warmup: float = option(0.05, "Share of the run in which the learning rate rises.")
    clip: float = option(1.0, "Largest norm of the gradient; 0: no clipping.")
    label_smoothing: float = option(0.0, "Label smoothing: probability spread over all classes.")
    flip: bool = option(
        False, "Mirror half of the training images; wrong where left and right matter, as in signs."
    )
    shift: int = option(0, "Shift training images by up to this many pixels.")
    min_area: float = option(1.0, "Least share of the area that random crops keep; 1: none.")
    max_ratio: float = option(10 / 9, "Largest ratio of the sides of such a crop; 1.33 is usual.")
    trivial: bool = option(
        False,
        "Change each training image by one random operation: TrivialAugment (arXiv:2103.10158).",
    )
    rand: bool = option(
        False, "Apply two operations of medium strength instead: RandAugment (arXiv:1909.13719)."
    )
    erase: float = option(
        0.0,
        "Share of training images with a rectangle set to its mean colour (arXiv:1708.04896).",
    )
    mixup: float = option(0.0, "Share of training images blended with another.")
    cutmix: float = option(0.0, "Share of training images with a rectangle pasted from another.")
    val_fraction: float | None = option(
        None,
        "Share of the training images held out for validation, in whole sources; 0: none.  "
        f"[default: {VAL_FRACTION} if DATA has no validation split]",
    )
    limit: int | None = option(None, "Use only this many training images, as many of each class.")
    shots: int | None = option(None, "Use only this many training images of each class.")
    class_weights: str = option(
        "equal",
        "Weights in the loss: equal, or balanced, so that rare classes count as much as others.",
    )
    sample: str = option(
        "all", "An epoch shows all images once (all), or every class equally often (balanced)."
    )
    seed: int = option(0, "Seed of all random numbers.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    precision: str = option("auto", "auto, fp32 or bf16; bf16 is slow on a device without it.")
    shard: bool = option(
        False,
        "Distribute the weights over the processes that torchrun started (FSDP2), for a model too "
        "large for one device.",
    )
    compile: bool | None = option(
        None,
        "Compile the model first, which takes a minute or so; if given, on a GPU also record the "
        "whole step. Dropout in several parts of a batch is computed without.  "
        "[default: on a GPU, for long runs]",
    )
    keep: str = option(
        "best",
        "Weights to keep: of the best epoch by validation (best), or of the last epoch (last).",
    )
    ema: float = option(
        0.0,
        "Decay of a moving average of the weights, for example 0.99; the average is validated and "
        "kept instead.  0: none.",
    )
    on_nan: str = option(
        "stop",
        "If a gradient is not finite: stop the run, or skip the step; skipped steps are counted "
        "and reported.",
    )
    patience: int = option(
        0, "Stop after this many epochs without a better validation; 0: train all epochs."
    )
    calibrate: bool = option(
        False,
        "Divide the head by the temperature that fits the validation images best "
        "(arXiv:1706.04599); the predicted classes stay the same.",
    )
    log: tuple[str, ...] = option(
        (),
        f"Log to {', '.join(LOGGERS)} too, each an extra of vitft: files in OUT, unless "
        "MLFLOW_TRACKING_URI, WANDB_API_KEY or WANDB_MODE says otherwise.",
    )
    save_seconds: float = option(60.0, "Seconds between saved states, for --resume.")
    resume: bool = option(False, "Continue the run in --out where it was stopped.")
    overwrite: bool = option(False, "Replace the run in --out.")

    def __post_init__(self) -> None:
        check_numbers(self)


def pick_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA where it is available, else the CPU.

    Of several processes, each gets a device of its own.

    Raises:
        ValueError: the device is unknown, or this machine has none of that number.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if name == "auto":
        return local_device(torch.device("cuda" if counts["cuda"] else "cpu"))
    kind, colon, number = name.partition(":")
    if kind not in counts or (colon and not number.isdecimal()):
        raise ValueError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:1, mps")
    if int(number or 0) >= counts[kind]:
        raise ValueError(f"device {name} is not there; use --device auto")
    return local_device(torch.device(name))


def pick_bf16(name: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16; "auto" does where the hardware supports it.

    Raises:
        ValueError: `name` is neither auto, fp32 nor bf16.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"unknown precision {name!r}; choose from auto, fp32, bf16")
    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_compile(options: TrainOptions, plan: Plan, n_train: int, device: torch.device) -> bool:
    """Return whether compiling the model saves more time than it takes.

    On two CPU cores it takes a minute for every image size and saves 3 to 4 % of a step. On a GPU,
    where memory traffic limits the step, it is assumed to pay from five million images in all on,
    which is not measured yet.

    Raises:
        ValueError: --compile is given, and there is no C++ compiler.
    """
    if options.compile and not any(map(shutil.which, ("cc", "c++", "g++", "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, and there is none; install g++")
    if options.compile is not None:
        return options.compile
    if n_processes() > 1:
        return False
    can_compile = device.type == "cuda" and find_spec("triton") and shutil.which("cc")
    return bool(can_compile) and not plan.n_cached and options.epochs * n_train >= 5_000_000


def make_plan(options: TrainOptions, device: torch.device) -> Plan:
    """Return the plan that the options describe, for training on `device`.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    augmentation = Augmentation(
        flip=options.flip,
        shift=options.shift,
        min_area=options.min_area,
        max_ratio=options.max_ratio,
        trivial=options.trivial,
        rand=options.rand,
        erase=options.erase,
        mixup=options.mixup,
        cutmix=options.cutmix,
    )
    same = (
        "epochs",
        "batch_size",
        "accumulate",
        "checkpoint_blocks",
        "lr",
        "weight_decay",
        "optimizer",
        "layer_decay",
        "schedule",
        "warmup",
        "clip",
        "label_smoothing",
        "sample",
        "keep",
        "ema",
        "on_nan",
        "patience",
        "seed",
        "save_seconds",
    )
    # A recorded step can neither change its number of parts nor be skipped.
    can_record = not options.auto_batch and options.on_nan == "stop"
    return Plan(
        **{name: getattr(options, name) for name in same},
        bf16=pick_bf16(options.precision, device),
        recorded=device.type == "cuda"
        and bool(options.compile)
        and n_processes() == 1
        and can_record,
        augmentation=augmentation,
        sizes=_parse_sizes(options.sizes),
        auto_accumulate=options.auto_batch,
    )


def _parse_sizes(texts: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
    """Return (image size in pixels, share of the epochs) for each SIZE:SHARE.

    Raises:
        ValueError: a text has another form.
    """
    try:
        return tuple(
            (int(size), float(share)) for size, share in (text.split(":") for text in texts)
        )
    except ValueError:
        raise ValueError(
            f"sizes={','.join(texts)} is not SIZE:SHARE,SIZE:SHARE, e.g. 16:0.6,24:0.3"
        ) from None
