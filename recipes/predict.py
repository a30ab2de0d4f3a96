"""Classify image files: `vitft predict --base BASE --adapter DIR cat.jpg`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from vitft.data.preprocess import read_image, to_tensor
from vitft.model.checkpoint import load_model
from vitft.training.cores import in_parts

Classes = dict[str, float]  # probabilities of the most probable, best first
ROWS = 64  # of a pass: images times adapters


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


def predict(options: PredictOptions) -> list[list[Classes]]:
    """Return for each image, by each adapter, or by the base if there is none, what it shows.

    Several adapters answer together, in one pass through the base.

    Raises:
        ValueError, OSError: a file is missing or broken, adapters can't be stacked, or `top` is
            not positive.
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
        classes = bank.classes[1:]
    model.to(device)

    def part(images: Tensor, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            images = base.normalize(images)
            logits: Tensor = model(images) if n == 1 else model(images, ids)
            return logits.softmax(dim=1)

    fit = partial(to_tensor, image_size=base.config.image_size, n_channels=base.config.n_channels)
    found = []
    step = max(1, ROWS // n)
    for i in range(0, len(options.image), step):
        paths = options.image[i : i + step]
        images = torch.stack([read_image(path, fit) for path in paths]).to(device)
        ids = torch.arange(1, n + 1, device=device).repeat(len(paths))
        answers = in_parts(part, images.repeat_interleave(n, dim=0), ids)
        found += [
            [_best(p, names, options.top) for p, names in zip(rows, classes, strict=True)]
            for rows in answers.view(len(paths), n, -1)
        ]
    return found


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
    """Classify and print a line an image, or one for each adapter."""
    options = replace(options, image=tuple(find_files(options.image)))
    several = len(options.adapter) > 1
    rows: list[dict[str, Any]] = []
    for path, answers in zip(options.image, predict(options), strict=True):
        by_adapter = dict(zip(options.adapter or ("",), answers, strict=True))
        result = {"adapters": by_adapter} if several else {"classes": answers[0]}
        rows.append({"image": path, **result})
        for name, best in by_adapter.items():
            shown = "  ".join(f"{label} {p:.1%}" for label, p in best.items())
            if not options.json:
                click.echo("  ".join([path, name, shown] if several else [path, shown]))
    if options.json:
        click.echo(json.dumps(rows))


command = cli.command("predict", PredictOptions, run)
