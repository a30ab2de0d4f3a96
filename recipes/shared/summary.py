"""A run, finished or stopped, in; its test figures, summary.json and report.html out."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipes.shared.card import write_card
from recipes.shared.options import TrainOptions
from recipes.shared.runs import written
from recipes.shared.splits import Splits, say
from vitft.devices.memory import peak_bytes
from vitft.devices.processes import is_first, n_processes
from vitft.evaluation.evaluate import Evaluation, evaluate
from vitft.files import write_json
from vitft.pictures.images import Images
from vitft.report.run import write_report
from vitft.training.run import Run
from vitft.version import __version__


def finish(
    run: Run, splits: Splits, options: TrainOptions, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the test split, write summary.json and report.html, and return the summary.

    Without a test split the report shows the validation split, and says so.
    """
    model, started, result = run.model, time.perf_counter(), None
    if len(splits.test):
        say(f"testing on {len(splits.test):,} images")
        result = evaluate(model, splits.test, task=run.plan.task, bf16=run.plan.bf16)
    summary = summarise(run, splits, options, folder, facts, result, time.perf_counter() - started)
    shown, name = splits.test, "test"
    if result is None:
        shown, name = splits.validation, "validation"
        result = evaluate(model, shown, task=run.plan.task, bf16=run.plan.bf16)
    report(run, options, folder, summary, shown, name, result)
    return summary


def report(
    run: Run,
    options: TrainOptions,
    folder: Path,
    summary: Mapping[str, Any],
    shown: Images,
    name: str,
    result: Evaluation | None = None,
) -> None:
    """Write report.html.

    Args:
        run: its history is drawn.
        options: of the run.
        folder: to write to.
        summary: what is told.
        shown: the images that were measured.
        name: of their split.
        result: what the model says of them; None of a run that was stopped.
    """
    if not is_first():
        return
    model = run.model
    if result is None:
        result = Evaluation(torch.zeros(0, len(model.classes)), torch.zeros(0), torch.zeros(0))
    facts = dict(summary)
    chosen = {name: v for name, v in written(options).items() if v and name not in summary}
    write_report(
        folder / "report.html",
        title=f"{folder.name}: {options.data}",
        facts=facts | {"options": chosen},
        history=run.history,
        classes=model.classes,
        image=shown.decode,
        split=name,
        labels=result.labels,
        probabilities=result.probabilities,
    )


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

    Without `result`, the test split's figures are None.
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
        **{f"frozen_{name}_accuracy": value for name, value in run.frozen.items()},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "images_per_second": round(len(run.history) and _n_images(run) / max(seconds, 1e-9), 1),
        "seconds": round(seconds, 1),
        "test_seconds": round(test_seconds, 1),
        "device": device_name(run.device),
        "n_processes": n_processes(),
        "float32_products": torch.get_float32_matmul_precision(),  # "highest" is without TF32
        "peak_memory_mb": (peak := peak_bytes(run.device)) and round(peak / 1e6),
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
    if is_first():
        write_json(folder / "summary.json", summary)
        write_card(folder)
    return summary


def accuracy_line(summary: Mapping[str, Any]) -> str:
    """Return the line that tells a run's accuracy: of the test split, or where there is none, of
    the validation split.
    """
    for split_name, key in (("test", "test_"), ("validation", "val_")):
        if (precision := summary.get(f"{key}mean_average_precision")) is not None:
            return f"{split_name} mean average precision {precision:.2%}"
        if (accuracy := summary.get(f"{key}accuracy")) is not None:
            return f"{split_name + ' accuracy':<15} {accuracy:.2%}"
    return "accuracy        not measured: no image is held out"


def device_name(device: torch.device) -> str:
    """Return the device's name, for a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    )


def _n_images(run: Run) -> float:
    return sum(row["images_per_second"] * row["seconds"] for row in run.history)
