"""Classify image files: `vitft predict --base BASE --adapter DIR cat.jpg`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

import adapters
from recipes.evaluate import ModelOptions, open_model
from recipes.options import pick_device
from vitft import options as cli
from vitft.checkpoint import load_model
from vitft.images import read_image, to_tensor
from vitft.options import option

Classes = dict[str, float]  # probabilities of the most probable, best first


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Print the most probable classes of each IMAGE, by each adapter if several are given."""

    image: tuple[str, ...] = option(help="Image files.", argument=True)
    adapter: tuple[str, ...] = option(
        (), "Folder of an adapter for that base; may be given several times.", repeated=True
    )
    top: int = option(5, "How many classes to print.")
    device: str = option("auto", "auto, cpu, cuda or mps.")
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
    n = len(options.adapter)
    if n < 2:
        base = open_model(options.base, *(options.adapter or (None,))).to(device)
        answer: Callable[[Tensor], Tensor] = base
        classes = [base.classes]
    else:
        base = load_model(options.base)
        bank = adapters.Bank(base, options.adapter).to(device)
        answer = partial(bank, ids=torch.arange(1, n + 1, device=device))
        classes = bank.classes[1:]
    fit = partial(to_tensor, image_size=base.config.image_size, n_channels=base.config.n_channels)
    found = []
    with torch.inference_mode():
        for path in options.image:
            image = base.normalize(read_image(path, fit).to(device)[None])
            rows = answer(image.expand(len(classes), -1, -1, -1)).softmax(dim=1)
            found.append(
                [_best(p, names, options.top) for p, names in zip(rows, classes, strict=True)]
            )
    return found


def _best(probabilities: Tensor, classes: Sequence[str], top: int) -> Classes:
    best = probabilities.topk(min(top, len(classes)))
    return {classes[i]: p for p, i in zip(*(t.tolist() for t in best), strict=True)}


def run(options: PredictOptions) -> None:
    """Classify and print a line an image, or one for each adapter."""
    several = len(options.adapter) > 1
    rows: list[dict[str, Any]] = []
    for path, answers in zip(options.image, predict(options), strict=True):
        by_adapter = dict(zip(options.adapter or ("",), answers, strict=True))
        told = {"adapters": by_adapter} if several else {"classes": answers[0]}
        rows.append({"image": path, **told})
        for name, best in by_adapter.items():
            shown = "  ".join(f"{label} {p:.1%}" for label, p in best.items())
            if not options.json:
                click.echo("  ".join([path, name, shown] if several else [path, shown]))
    if options.json:
        click.echo(json.dumps(rows))


command = cli.command("predict", PredictOptions, run)
