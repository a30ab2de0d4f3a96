"""Features of image files: `vitft embed --base BASE IMAGE... --out FILE.npz`."""

import io
from dataclasses import dataclass

import click
import numpy as np
import torch
from torch import Tensor

from recipes.shared.classifier import Classifier, expand
from recipes.shared.model import ModelOptions
from recipes.shared.places import output
from vitft.bars import progress_bar
from vitft.command import options as cli
from vitft.command.options import option
from vitft.command.telling import complain
from vitft.files import write_bytes


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ModelOptions):
    """Write the features of each IMAGE, which the head reads, to OUT, an .npz file.

    It holds features, float32 (n, D or 2 D), and paths (n,).
    """

    image: tuple[str, ...] = option(help="Image files, or folders of them.", argument=True)
    adapter: str | None = option(
        None, "An adapter for that base: its folder, or hf:OWNER/NAME[@REVISION]."
    )
    out: str = option(help="The .npz file to write.")
    skip_broken: bool = option(False, "Skip broken images, and name them.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")


def embed(options: EmbedOptions) -> tuple[np.ndarray, list[str]]:
    """Return the features, float32 (n, D or 2 D), of the images, and their paths.

    Raises:
        ValueError, OSError: a file is missing or broken.
    """
    classifier = Classifier(options.base, options.adapter or (), device=options.device)
    images = [*expand(options.image)]
    paths: list[str] = []
    features = [torch.zeros(0, classifier.base.config.n_features)]
    with progress_bar(len(images)) as bar:
        for read in classifier.read_each(images):
            bar.update(len(read))
            for _, image in read:
                if isinstance(image, Exception):
                    if not options.skip_broken:
                        raise ValueError(f"{image}, or leave it out with --skip-broken")
                    complain(f"skipped: {image}")
            readable = [(path, image) for path, image in read if isinstance(image, Tensor)]
            if readable:
                paths += [path for path, _ in readable]
                features.append(classifier.embed(torch.stack([image for _, image in readable])))
    return torch.cat(features).numpy(), paths


def run(options: EmbedOptions) -> None:
    """Write the file, and print its shape."""
    features, paths = embed(options)
    content = io.BytesIO()
    np.savez(content, features=features, paths=np.array(paths))
    with output(options.out) as out:
        write_bytes(out, content.getvalue())
    click.echo(f"features        {len(features):,} x {features.shape[1]:,} in {options.out}")


command = cli.command("embed", EmbedOptions, run)
