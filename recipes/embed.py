"""Features of image files: `vitft embed --base BASE IMAGE... --out FILE.npz`."""

import io
from dataclasses import dataclass

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recipes.shared.classifier import Classifier, expand
from recipes.shared.model import ModelOptions
from vitft.command import options as cli
from vitft.command.options import option
from vitft.files import write_bytes


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ModelOptions):
    """Write what the head reads of each IMAGE to OUT, an .npz file.

    It holds features, float32 (n, D or 2 D), and paths (n,).
    """

    image: tuple[str, ...] = option(help="Image files, or folders of them.", argument=True)
    adapter: str | None = option(None, "Folder of an adapter for that base.")
    out: str = option(help="The .npz file to write.")
    skip_broken: bool = option(False, "Leave out images that are broken, and name them.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")


def embed(options: EmbedOptions) -> tuple[np.ndarray, list[str]]:
    """Return the features (n, D or 2 D) of the images, and their paths.

    Raises:
        ValueError, OSError: a file is missing or broken.
    """
    classifier = Classifier(options.base, options.adapter or (), device=options.device)
    paths: list[str] = []

    def images() -> "list[Tensor]":
        found = []
        for path in tqdm([*expand(options.image)], unit=" images", disable=None):
            try:
                found.append(classifier.read(path))
            except ValueError as error:
                if not options.skip_broken:
                    raise
                click.echo(f"skipped: {error}", err=True)
            else:
                paths.append(path)
        return found

    features = [classifier.embed(batch) for batch in classifier.batches(iter(images()))]
    return torch.cat([*features, torch.zeros(0, *features[0].shape[1:])]).numpy(), paths


def run(options: EmbedOptions) -> None:
    """Write the file, and print its shape."""
    features, paths = embed(options)
    content = io.BytesIO()
    np.savez(content, features=features, paths=np.array(paths))
    write_bytes(options.out, content.getvalue())
    click.echo(f"features        {len(features):,} x {features.shape[1]:,} in {options.out}")


command = cli.command("embed", EmbedOptions, run)
