"""Classify image files: `vitft predict --base BASE --adapter DIR cat.jpg`."""

import json
from dataclasses import dataclass
from functools import partial

import click
import torch

from recipes.evaluate import ModelOptions, open_model
from recipes.options import pick_device
from vitft import options as cli
from vitft.images import read_image, to_tensor
from vitft.options import option


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Print the most probable classes of each IMAGE."""

    image: tuple[str, ...] = option(help="Image files.", argument=True)
    top: int = option(5, "How many classes to print.")
    device: str = option("auto", "auto, cpu, cuda or mps.")
    json: bool = option(False, "Print JSON.")


def predict(options: PredictOptions) -> list[dict[str, float]]:
    """Return for each image the probability of its most probable classes, best first.

    Raises:
        ValueError, OSError: a file is missing or broken, or `top` is not positive.
    """
    if options.top < 1:
        raise ValueError(f"top={options.top} is not positive; leave it out for 5")
    device = pick_device(options.device)
    model = open_model(options).to(device)
    fit = partial(to_tensor, image_size=model.config.image_size, n_channels=model.config.n_channels)
    found = []
    with torch.inference_mode():
        for path in options.image:
            image = read_image(path, fit).to(device)
            probabilities = model(model.normalize(image[None])).softmax(dim=1)[0]
            best = probabilities.topk(min(options.top, len(model.classes)))
            found.append(
                {model.classes[i]: p for p, i in zip(*(t.tolist() for t in best), strict=True)}
            )
    return found


def run(options: PredictOptions) -> None:
    """Classify and print a line an image."""
    found = predict(options)
    if options.json:
        rows = [
            {"image": path, "classes": best}
            for path, best in zip(options.image, found, strict=True)
        ]
        click.echo(json.dumps(rows))
        return
    for path, best in zip(options.image, found, strict=True):
        click.echo(f"{path}  " + "  ".join(f"{name} {p:.1%}" for name, p in best.items()))


command = cli.command("predict", PredictOptions, run)
