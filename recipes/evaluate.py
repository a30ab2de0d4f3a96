"""Measure a base, or an adapted one, on a test split: `vitft evaluate --base BASE --data DATA`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch

from recipes.shared.model import ModelOptions, open_model
from recipes.shared.options import DataOptions, pick_bf16, pick_device
from recipes.shared.splits import held, open_data
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.images import Images
from vitft.data.listing import ImageSet
from vitft.model.vit import VisionTransformer
from vitft.training.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions, ModelOptions):
    """Measure accuracy on the test split of DATA, or where it has none, on its validation split."""

    adapter: str | None = option(None, "Folder of an adapter for that base.")
    batch_size: int | None = option(None, "Images at a time.  [default: by their size, up to 500]")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    precision: str = option("auto", "auto, fp32, or bf16, slow where the device lacks it.")
    json: bool = option(False, "Print JSON.")


def measured_split(data: ImageSet) -> tuple[str, Images]:
    """Return the split to measure, and its name: test, or where there is none, validation.

    Raises:
        ValueError: there is neither.
    """
    for name, images in (("test", data.test), ("validation", data.validation)):
        if len(images):
            return name, images
    raise ValueError(
        f"{data.name} has neither test nor validation images; put some into test/CLASS/, or hold "
        "a share out by --test-fraction (1 for all)"
    )


def labels_for(model: VisionTransformer, classes: Sequence[str], images: Images) -> None:
    """Number the labels of images as the model numbers its classes.

    Raises:
        ValueError: an image is of a class that the model does not know.
    """
    numbers = [model.classes.index(name) if name in model.classes else -1 for name in classes]
    labels = torch.tensor(numbers)[images.labels]
    if (labels < 0).any():
        unknown = classes[int(images.labels[labels < 0][0])]
        known = ", ".join(model.classes[:20])
        raise ValueError(f"the model has no class {unknown!r}; it tells apart {known}")
    images.labels = labels


def run(options: EvaluateOptions) -> None:
    """Evaluate and print accuracy and loss."""
    device = pick_device(options.device)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} is not positive")
    model = open_model(options.base, options.adapter).to(device)
    data = open_data(options, model)
    split, images = measured_split(data)
    labels_for(model, data.classes, images)
    images = held(images, options, device)
    bf16 = pick_bf16(options.precision, device)
    result = evaluate(model, images, bf16=bf16, batch_size=options.batch_size)
    figures: dict[str, Any] = {
        f"{split}_accuracy": result.accuracy,
        f"{split}_loss": result.loss,
        f"{split}_balanced_accuracy": result.balanced_accuracy,
        f"{split}_macro_f1": result.macro_f1,
        f"{split}_calibration_error": result.calibration_error,
        f"n_{split}": len(images),
        "data": options.data,
    }
    if options.json:
        click.echo(json.dumps(figures))
    else:
        accuracy, loss = (f"{split} {name}" for name in ("accuracy", "loss"))
        click.echo(f"{accuracy:<15} {result.accuracy:.2%} of {len(images):,} images")
        click.echo(f"{loss:<15} {result.loss:.4f}")
        click.echo(f"balanced        {result.balanced_accuracy:.2%}, the mean over the classes")
        click.echo(f"macro F1        {result.macro_f1:.4f}")
        error = result.calibration_error
        click.echo(f"calibration     {error:.2%} from accuracy on average (ECE)")


command = cli.command("evaluate", EvaluateOptions, run)
