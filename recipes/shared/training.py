"""What `pretrain` and `finetune` share: images split, a model trained, the test split read once."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from recipes.shared.options import VAL_FRACTION, DataOptions, TrainOptions, pick_compile
from recipes.shared.runs import start_run, written
from vitft.data.images import Images, listed
from vitft.data.listing import ImageSet
from vitft.data.preprocess import Fit
from vitft.data.sources import load_data
from vitft.data.split import few, limit, split
from vitft.files import write_json
from vitft.model.vit import VisionTransformer
from vitft.report.run import write_report
from vitft.training.evaluate import Evaluation, evaluate
from vitft.training.loop import train as train_runs
from vitft.training.metrics import temperature
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.task import SingleLabel, balanced
from vitft.version import __version__

CLASS_WEIGHTS = ("equal", "balanced")


@dataclass(frozen=True)
class Splits:
    """Images to train on, to watch by, and to report on once."""

    train: Images
    validation: Images
    test: Images

    def __str__(self) -> str:
        train, validation, test = (f"{len(x):,}" for x in (self.train, self.validation, self.test))
        return f"{train} images ({validation} to validate, {test} to test)"


def open_data(options: DataOptions, model: VisionTransformer) -> ImageSet:
    """Return the set of the options for a model, which keeps the range of its 16-bit pictures.

    Raises:
        ValueError, OSError: as for `load_data`.
    """
    data = load_data(
        options.data,
        Fit.of(model),
        test_fraction=options.test_fraction,
        source_pattern=options.source_pattern,
    )
    for note in data.notes:
        say(note)
    model.framing = data.fit.framing
    return data


def held(images: Images, options: DataOptions, device: torch.device) -> Images:
    """Return the images on `device` where they fit, as asked without those that are broken.

    Raises:
        ValueError: an image is broken; names the first ten.
    """
    if not options.skip_broken:
        return images.to(device)
    whole, broken = images.readable(device)
    if broken:
        say(f"{len(broken)} broken pictures are left out: {listed(broken)}")
    return whole


def make_splits(data: ImageSet, options: TrainOptions, device: torch.device) -> Splits:
    """Return training, validation and test images, held on `device` where they fit.

    Raises:
        ValueError: there is only one class, or an option is out of its range.
    """
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has only the class {data.classes[0]!r}; add another")
    if not len(data.train):
        raise ValueError(f"{data.name} has no images to train on; put them into train/CLASS/")
    train, validation, fraction = data.train, data.validation, options.val_fraction
    if not len(validation):
        fraction = VAL_FRACTION if fraction is None else fraction
        train, validation = split(train, fraction=fraction, seed=options.seed)
    elif fraction is not None:
        raise ValueError(
            f"{data.name} has a validation split, so --val-fraction has nothing to do; leave it out"
        )
    if options.shots is not None:
        train = few(train, options.shots, seed=options.seed)
    if options.limit is not None:
        train = limit(train, options.limit, seed=options.seed)
    train, validation, test = (held(x, options, device) for x in (train, validation, data.test))
    if not len(train):
        raise ValueError(f"{data.name} has no readable image to train on")
    if options.calibrate and not len(validation):
        raise ValueError("--calibrate needs validation images; leave out --val-fraction 0")
    return Splits(train, validation, test)


def weighted(plan: Plan, options: TrainOptions, train: Images, n_classes: int) -> Plan:
    """Return the plan with the classes' weights in its loss.

    Raises:
        ValueError: unknown weights.
    """
    if options.class_weights not in CLASS_WEIGHTS:
        known = ", ".join(CLASS_WEIGHTS)
        raise ValueError(f"class_weights={options.class_weights!r} is none of {known}")
    if options.class_weights == "equal":
        return plan
    return replace(plan, task=SingleLabel(balanced(train.labels, n_classes)))


def train(
    model: VisionTransformer,
    splits: Splits,
    plan: Plan,
    options: TrainOptions,
    folder: Path,
    save: Callable[[Run], dict[str, Any]],
    belongs: Sequence[str] = (),
) -> Run:
    """Train the model in place, or go on where the run was stopped, and return the run.

    A run that is stopped after an epoch leaves what it has learned so far, ready for use.

    Args:
        save: writes what was trained, and returns the summary's facts about it.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; says how to go on.
    """
    compiled = pick_compile(options, plan, len(splits.train), model.head.weight.device)
    plan = weighted(replace(plan, compiled=compiled), options, splits.train, len(model.classes))
    run = Run(model, splits.train, splits.validation, plan, folder, belongs)
    if options.resume:
        run.restore()
    else:  # only now, with everything checked, an earlier run may go
        start_run(options, folder)
    try:
        train_runs(run)
    except KeyboardInterrupt:
        usable = ""
        if run.history:
            run.best.put_back(run.trainable)
            facts = {"stopped": f"after {run.epoch} of {plan.epochs} epochs"} | save(run)
            summary = summarise(run, splits, options, folder, facts)
            report(run, options, folder, summary, splits.test, "test")
            usable = f"; epoch {run.kept['epoch']} is there to use"
        raise KeyboardInterrupt(
            f"the state is saved in {folder}; the same command with --resume goes on{usable}"
        ) from None
    calibrate(run, options)
    return run


@torch.no_grad()
def calibrate(run: Run, options: TrainOptions) -> None:
    """Divide the head by the best temperature for the validation images, if asked for."""
    if not options.calibrate:
        return
    found = evaluate(run.model, run.validation, bf16=run.plan.bf16)
    run.temperature = temperature(found.probabilities, found.labels)
    for parameter in run.model.head.parameters():
        parameter.div_(run.temperature)


def finish(
    run: Run, splits: Splits, options: TrainOptions, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the test split, write summary.json and report.html, and return the summary.

    Without a test split the report shows the validation split, and says so.
    """
    model, started, result = run.model, time.perf_counter(), None
    if len(splits.test):
        say(f"testing on {len(splits.test):,} images")
        result = evaluate(model, splits.test, bf16=run.plan.bf16)
    summary = summarise(run, splits, options, folder, facts, result, time.perf_counter() - started)
    shown, name = splits.test, "test"
    if result is None:
        shown, name = splits.validation, "validation"
        result = evaluate(model, shown, bf16=run.plan.bf16)
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
    """Write summary.json and return it; without `result`, the test split's figures are None."""
    model = run.model
    seconds = sum(row["seconds"] for row in run.history)
    summary: dict[str, Any] = {
        "test_accuracy": result.accuracy if result else None,
        "test_loss": result.loss if result else None,
        "test_balanced_accuracy": result.balanced_accuracy if result else None,
        "test_macro_f1": result.macro_f1 if result else None,
        "test_calibration_error": result.calibration_error if result else None,
        "val_accuracy": run.kept.get("val_accuracy"),
        "val_balanced_accuracy": run.kept.get("val_balanced_accuracy"),
        "val_macro_f1": run.kept.get("val_macro_f1"),
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
    return summary


def accuracy_line(summary: Mapping[str, Any]) -> str:
    """Return the line that tells a run's accuracy: of the test split, or where there is none, of
    the validation split.
    """
    for split_name, key in (("test", "test_accuracy"), ("validation", "val_accuracy")):
        if (accuracy := summary.get(key)) is not None:
            return f"{split_name + ' accuracy':<15} {accuracy:.2%}"
    return "accuracy        not measured: no image is held out"


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


def _n_images(run: Run) -> float:
    return sum(row["images_per_second"] * row["seconds"] for row in run.history)
