"""Classify image files: `vitft predict --base BASE --adapter DIR cat.jpg`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import adapters
from recipes.evaluate import ModelOptions, open_model
from recipes.shared.options import pick_device
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.folders import find_images
from vitft.data.preprocess import Fit, read_image
from vitft.model.checkpoint import load_model
from vitft.training.cores import in_parts
from vitft.training.evaluate import suitable_batch

Classes = dict[str, float]  # probabilities of the most probable, best first
MAX_ROWS = 64  # of a pass: images times adapters


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Print the most probable classes of each IMAGE, by each adapter if several are given."""

    image: tuple[str, ...] = option(help="Image files, or folders of them.", argument=True)
    adapter: tuple[str, ...] = option(
        (), "Folder of an adapter for that base; may be given several times.", repeated=True
    )
    top: int = option(5, "How many classes to print.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    json: bool = option(False, "Print JSON.")


def predict(options: PredictOptions) -> Iterator[tuple[str, list[Classes] | ValueError]]:
    """Yield each image's path with what it shows, by each adapter, or by the base if there is none.

    Several adapters answer together, in one pass through the base. A broken image costs only
    itself: in place of its answer comes the error.

    Raises:
        ValueError, OSError: a file is missing, adapters can't be stacked, or `top` is not positive.
    """
    if options.top < 1:
        raise ValueError(f"top={options.top} is not positive; leave it out for 5")
    device = pick_device(options.device)
    n = len(options.adapter) or 1
    if n == 1:
        base = open_model(options.base, *(options.adapter or (None,)))
        model: nn.Module = base
        classes = [base.classes]
    else:
        base = load_model(options.base)
        model = bank = adapters.Bank(base, options.adapter)
        if bank.preprocessing is not None:
            base.preprocessing = bank.preprocessing
        classes = bank.classes[1:]
    model.to(device)

    def part(images: Tensor, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            images = base.normalize(images)
            logits: Tensor = model(images) if n == 1 else model(images, ids)
            return logits.softmax(dim=1)

    fit = Fit.of(base)
    step = max(1, min(MAX_ROWS, suitable_batch(base)) // n)
    for i in range(0, len(options.image), step):
        paths = options.image[i : i + step]
        read = [_read(path, fit) for path in paths]
        whole = [image for image in read if isinstance(image, Tensor)]
        rows: Iterator[Tensor] = iter(())
        if whole:
            images = torch.stack(whole).to(device)
            ids = torch.arange(1, n + 1, device=device).repeat(len(whole))
            answers = in_parts(part, images.repeat_interleave(n, dim=0), ids)
            rows = iter(answers.view(len(whole), n, -1))
        for path, image in zip(paths, read, strict=True):
            if isinstance(image, ValueError):
                yield path, image
            else:
                own = zip(next(rows), classes, strict=True)
                yield path, [_best(p, names, options.top) for p, names in own]


def _read(path: str, fit: Fit) -> Tensor | ValueError:
    """Return the image file at `path`, or what is wrong with it."""
    try:
        return read_image(path, fit)
    except ValueError as error:
        return error


def find_files(names: Sequence[str]) -> Iterator[str]:
    """Yield the names of files, and those of the images in and below folders.

    Raises:
        ValueError: a folder holds none.
    """
    for name in names:
        if not Path(name).is_dir():
            yield name
        elif found := find_images(Path(name)):
            yield from map(str, found)
        else:
            raise ValueError(f"{name} holds no images")


def _best(probabilities: Tensor, classes: Sequence[str], top: int) -> Classes:
    best = probabilities[: len(classes)].topk(min(top, len(classes)))
    return {classes[i]: p for p, i in zip(*(t.tolist() for t in best), strict=True)}


def run(options: PredictOptions) -> None:
    """Classify, and print a line an image, or one for each adapter, as they come.

    Raises:
        ValueError: images were broken; the others have been answered.
    """
    options = replace(options, image=tuple(find_files(options.image)))
    several = len(options.adapter) > 1
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for path, answers in predict(options):
        if isinstance(answers, ValueError):
            broken.append(path)
            click.echo(f"skipped: {answers}", err=True)
            continue
        by_adapter = dict(zip(options.adapter or ("",), answers, strict=True))
        result = {"adapters": by_adapter} if several else {"classes": answers[0]}
        rows.append({"image": path, **result})
        for name, best in by_adapter.items():
            shown = "  ".join(f"{label} {p:.1%}" for label, p in best.items())
            if not options.json:
                click.echo("  ".join([path, name, shown] if several else [path, shown]))
    if options.json:
        click.echo(json.dumps(rows))
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(options.image)} images are broken: {', '.join(broken[:10])}"
            f"{', ...' if len(broken) > 10 else ''}; the others are answered"
        )


command = cli.command("predict", PredictOptions, run)
