"""Measure a base, or an adapted one, on a test split: `vitft evaluate --base BASE --data DATA`."""

import json
from dataclasses import dataclass
from typing import Any

import click
import torch

import adapters
from adapters.folder import read_adapter
from recipes.shared.options import pick_bf16, pick_device
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.sources import ImageSet, load_data
from vitft.model.checkpoint import load_model
from vitft.model.vit import VisionTransformer
from vitft.training.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of every command that uses a model."""

    base: str = option(help="A .safetensors file, a run's folder, or the name of a bundled base.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Measure accuracy on the test split of DATA."""

    adapter: str | None = option(None, "Folder of an adapter for that base.")

    data: str = option(
        help="Data set: a name that `vitft data` lists, "
        "or a folder with train/CLASS and test/CLASS."
    )
    batch_size: int | None = option(None, "Images at a time.  [default: by their size, up to 500]")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    precision: str = option("auto", "auto, fp32, or bf16, slow where the device lacks it.")
    json: bool = option(False, "Print JSON.")


def open_model(base: str, adapter: str | None) -> VisionTransformer:
    """Return the base, adapted where an adapter is given, ready for evaluation.

    Raises:
        ValueError, OSError: a file is missing, broken, or the adapter is another base's.
    """
    model = load_model(base)
    if adapter is None:
        return model
    adapters.load_adapter(model, adapter)
    n_classes, saved = model.head.out_features, read_adapter(adapter)
    if saved.classes is None and "head" in (saved.config.get("modules_to_save") or ()):
        model.classes = tuple(str(i) for i in range(n_classes))  # PEFT saves no names
    if len(model.classes) != n_classes:
        raise ValueError(
            f"{adapter} names {len(model.classes)} classes, but its head has {n_classes}"
        )
    return model


def labels_for(model: VisionTransformer, data: ImageSet) -> None:
    """Number the labels of the test split as the model numbers its classes.

    Raises:
        ValueError: the data has a class that the model does not know.
    """
    if unknown := [name for name in data.classes if name not in model.classes]:
        known = ", ".join(model.classes[:20])
        raise ValueError(f"the model has no class {unknown[0]!r}; it tells apart {known}")
    data.test.labels = torch.tensor([model.classes.index(name) for name in data.classes])[
        data.test.labels
    ]


def run(options: EvaluateOptions) -> None:
    """Evaluate and print accuracy and loss."""
    device = pick_device(options.device)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} is not positive")
    model = open_model(options.base, options.adapter).to(device)
    data = load_data(
        options.data,
        image_size=model.image_size,
        n_channels=model.config.n_channels,
        only_test=True,
    )
    labels_for(model, data)
    bf16 = pick_bf16(options.precision, device)
    result = evaluate(model, data.test.to(device), bf16=bf16, batch_size=options.batch_size)
    figures: dict[str, Any] = {
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "n_test": len(data.test),
        "data": options.data,
    }
    if options.json:
        click.echo(json.dumps(figures))
    else:
        click.echo(f"test accuracy   {result.accuracy:.2%} of {len(data.test):,} images")
        click.echo(f"test loss       {result.loss:.4f}")


command = cli.command("evaluate", EvaluateOptions, run)
