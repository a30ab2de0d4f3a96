"""Measure a base, or an adapted one, on a test split: `vitft evaluate --base BASE --data DATA`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import click
import torch

from recipes.shared.model import ModelOptions, open_model
from recipes.shared.options import DataOptions, pick_bf16, pick_device
from recipes.shared.splits import on_device, open_data
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.listing import ImageSet
from vitft.devices.processes import joined
from vitft.evaluation.evaluate import evaluate
from vitft.evaluation.task import TASKS
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions, ModelOptions):
    """Measure accuracy on the test split of DATA, or on its validation split if it has no other."""

    adapter: str | None = option(
        None, "An adapter for that base: its folder, or hf:OWNER/NAME[@REVISION]."
    )
    batch_size: int | None = option(None, "Images in a batch.  [default: by their size, up to 500]")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    precision: str = option("auto", "auto, fp32 or bf16; bf16 is slow on a device without it.")
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
    """Change the labels of images, in place, to the model's numbering of the classes.

    Args:
        model: the model to measure.
        classes: the data set's classes, in the order of its labels.
        images: their labels are class indices (n,), or 0 and 1 (n, len(classes)).

    Raises:
        ValueError: an image is of a class that the model does not know, or has several labels where
            the model predicts one, or one where it predicts several.
    """
    several, index = images.labels.ndim == 2, {name: i for i, name in enumerate(model.classes)}
    if several != (model.labels == "several"):
        kind = "several labels" if several else "one label"
        raise ValueError(f"the images have {kind} each, but the model tells {model.labels}")
    there = images.labels.sum(dim=0) > 0 if several else images.labels.bincount() > 0
    for name, is_there in zip(classes, there.tolist(), strict=False):
        if is_there and name not in index:
            known = ", ".join(model.classes[:20])
            raise ValueError(f"the model has no class {name!r}; it tells apart {known}")
    # A class that the model does not know, and no image has, gets a number that is not used.
    numbers = torch.tensor([index.get(name, len(index)) for name in classes])
    if several:
        labels = images.labels.new_zeros(len(images), len(index) + 1)
        labels[:, numbers] = images.labels
        images.labels = labels[:, :-1]
    else:
        images.labels = numbers[images.labels]


def run(options: EvaluateOptions) -> None:
    """Evaluate the model, and print accuracy and loss.

    Raises:
        ValueError, OSError: a file is missing or broken, an option is out of its range, or the
            classes do not fit the model.
    """
    with joined():
        _run(options)


def _run(options: EvaluateOptions) -> None:
    """Evaluate the model, in a process that has joined the others."""
    device = pick_device(options.device)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} is not positive")
    model = open_model(options.base, options.adapter).to(device)
    data = open_data(options, model, learn=False)
    split, images = measured_split(data)
    labels_for(model, data.classes, images)
    images = on_device(images, device, skip_broken=options.skip_broken)
    if not len(images):
        raise ValueError(f"{data.name} has no readable image in its {split} split")
    bf16 = pick_bf16(options.precision, device)
    result = evaluate(
        model, images, task=TASKS[model.labels](), bf16=bf16, batch_size=options.batch_size
    )
    figures = {f"{split}_{name}": value for name, value in result.figures.items()}
    figures |= {f"{split}_loss": result.loss}
    if options.json:
        click.echo(json.dumps(figures | {f"n_{split}": len(images), "data": options.data}))
        return
    accuracy = figures.pop(f"{split}_accuracy")
    click.echo(f"{split + ' accuracy':<15} {accuracy:.2%} of {len(images):,} images")
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):<15} {value:.4f}")


command = cli.command("evaluate", EvaluateOptions, run)
