"""Bake an adapter into a plain base: `vitft merge --base BASE --adapter DIR --out FILE`."""

import shlex
from dataclasses import dataclass

import click
import torch

import adapters
from recipes.shared.model import ModelOptions, open_model
from recipes.shared.places import new_output
from vitft.command import options as cli
from vitft.command.options import option
from vitft.evaluation.evaluate import suitable_batch
from vitft.model.checkpoint import load_model, save_model


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ModelOptions):
    """Write a plain base with the adapter baked in, as fast as the base itself."""

    adapter: str = option(help="An adapter for that base: its folder, or hf:OWNER/NAME[@REVISION].")
    out: str = option(help="The .safetensors file to write.")


def merge(options: MergeOptions) -> float:
    """Write the merged base; return the largest difference of its logits from the adapted base's.

    The difference is that of the written file's logits on images of uniform noise: 64, or fewer if
    they are large.

    Raises:
        ValueError, OSError: a file is missing, broken or cannot be written, or the method
            can't be merged.
    """
    with new_output(options.out) as out:
        model = open_model(options.base, options.adapter)
        shape = (
            min(64, suitable_batch(model)),
            model.config.n_channels,
            model.image_size,
            model.image_size,
        )
        images = torch.randint(
            0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        with torch.inference_mode():
            before = model(model.normalize(images))
        save_model(adapters.merge(model), out)
        merged = load_model(out)
        with torch.inference_mode():
            return (merged(merged.normalize(images)) - before).abs().max().item()


def run(options: MergeOptions) -> None:
    """Merge and print the largest difference."""
    difference, out = merge(options), shlex.quote(options.out)
    click.echo(f"merged base     {out}")
    click.echo(f"largest logit difference on images of noise   {difference:.2e}")
    click.echo(f"use it          vitft predict --base {out} IMAGE")


command = cli.command("merge", MergeOptions, run)
