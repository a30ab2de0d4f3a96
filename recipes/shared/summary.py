"""A finished or stopped run in; its test figures, summary.json, model card and report.html out."""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import adapters
from adapters.changes import Update
from recipes.shared.options import TrainOptions
from recipes.shared.report import keep_findings, make_report
from recipes.shared.splits import Splits, say
from recipes.sharing.card import write_card
from vitft.command.telling import complain
from vitft.devices.memory import peak_bytes
from vitft.devices.processes import is_first, n_processes
from vitft.evaluation.evaluate import Evaluation, evaluate
from vitft.files import read_json, write_json
from vitft.model.checkpoint import load_model
from vitft.model.vit import VisionTransformer
from vitft.records import part_of
from vitft.training.run import Run
from vitft.version import __version__

# entries of summary.json that finishing a finished run again, elsewhere perhaps, must not change
COMPUTED = (
    "device",
    "n_processes",
    "n_together",
    "float32_products",
    "peak_memory_mb",
    "feature_seconds",
    "versions",
)


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """The fields of summary.json that tell whether a run was finished."""

    file: str = "model.safetensors"
    epochs_done: int | None = None
    stopped: str | None = None


def summary_before(run: Run, folder: Path) -> dict[str, Any]:
    """Return the summary of a run that was finished when it was restored; {} of any other run."""
    with suppress(OSError, ValueError):
        found = read_json(folder / "summary.json")
        ended = part_of(_Ended, found, "summary.json")
        is_whole = ended.stopped is None and (folder / ended.file).is_file()
        if run.is_done() and is_whole and ended.epochs_done == run.epoch:
            return dict(found)
    return {}


def as_computed(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the summary of a finished run says of how it was computed, which stays so."""
    return {name: before[name] for name in COMPUTED if name in before}


def finish(
    run: Run, splits: Splits, options: TrainOptions, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the test split, write summary.json, the card and the report; return the summary.

    Without a test split the report shows the validation split, and says so.

    Args:
        run: a finished run, with the weights to keep.
        splits: its images.
        options: its options.
        folder: its folder.
        facts: what the summary says of the files that were saved.
    """
    model, started, result = run.model, time.perf_counter(), None
    if len(splits.test):
        say(f"testing on {len(splits.test):,} images")
        result = evaluate(model, splits.test, task=run.plan.task, bf16=run.plan.bf16)
    summary = summarise(run, splits, options, folder, facts, result, time.perf_counter() - started)
    split: Literal["test", "validation"] = "test"
    shown = splits.test
    if result is None:
        split, shown = "validation", splits.validation
        result = evaluate(model, shown, task=run.plan.task, bf16=run.plan.bf16)
    keep_findings(model, shown, split, result, folder, _updates(model, facts))
    if is_first():
        make_report(folder)
    return summary


def summarise(
    run: Run,
    splits: Splits,
    options: TrainOptions,
    folder: Path,
    facts: Mapping[str, Any],
    result: Evaluation | None = None,
    test_seconds: float = 0.0,
) -> dict[str, Any]:
    """Write summary.json and the model card, and return the summary.

    Args:
        run, splits, options, folder, facts: as for `finish`.
        result: the predictions for the test split; without it, test figures are None.
        test_seconds: how long they took.
    """
    model = run.model
    seconds = sum(row["seconds"] for row in run.history)
    summary: dict[str, Any] = {
        "test_accuracy": result.accuracy if result else None,
        "test_loss": result.loss if result else None,
        **({f"test_{name}": x for name, x in result.figures.items()} if result else {}),
        "val_accuracy": None,
        **{name: x for name, x in run.kept.items() if name.startswith("val_")},
        "temperature": run.temperature,
        "kept_epoch": run.kept.get("epoch"),
        "epochs_done": run.epoch,
        **{f"frozen_{name}": value for name, value in run.frozen.items()},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "images_per_second": round(len(run.history) and _n_images(run) / max(seconds, 1e-9), 1),
        "seconds": round(seconds, 1),
        "test_seconds": round(test_seconds, 1),
        "device": device_name(run.device),
        "n_processes": n_processes(),
        "float32_products": torch.get_float32_matmul_precision(),  # "highest": no TF32
        "peak_memory_mb": (peak := peak_bytes(run.device)) and round(peak / 1e6),
        "data": options.data,
        "n_train": len(splits.train),
        "n_validation": len(splits.validation),
        "n_test": len(splits.test),
        "notes": [*splits.notes],
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "vitft": __version__,
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
        **facts,
    }
    if is_first():
        write_json(folder / "summary.json", summary)
        write_card(folder)
    return summary


def _updates(model: VisionTransformer, facts: Mapping[str, Any]) -> Iterator[Update] | None:
    """Return what fine-tuning has added to the base's weights; None if that is not known.

    It is not known after pretraining, or where the base has been moved.
    """
    if facts.get("adapter") == "full":
        try:
            return adapters.differences(model, load_model(facts["base"]))
        except (OSError, ValueError) as error:  # the run itself is done
            complain(f"the report does not show what has changed of the base: {error}")
            return None
    return adapters.updates(model) if "adapter" in facts else None


def accuracy_line(summary: Mapping[str, Any]) -> str:
    """Return the line with a run's accuracy on the test split, or on validation without a test."""
    for split_name, key in (("test", "test_"), ("validation", "val_")):
        if (precision := summary.get(f"{key}mean_average_precision")) is not None:
            return f"{split_name} mean average precision {precision:.2%}"
        if (accuracy := summary.get(f"{key}accuracy")) is not None:
            return f"{split_name + ' accuracy':<15} {accuracy:.2%}"
    return "accuracy        not measured: no image is held out"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu" with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    )


def _n_images(run: Run) -> float:
    return sum(row["images_per_second"] * row["seconds"] for row in run.history)
