"""Make a base of another library's ViT: `vitft convert SOURCE --out FILE`."""

import shlex
from dataclasses import dataclass, replace

import click
import torch

from recipes.shared.places import new_output
from vitft.command import options as cli
from vitft.command.options import option
from vitft.model.checkpoint import config_of, load_model, save_model
from vitft.model.vit import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert another library's Vision Transformer to a vitft base."""

    source: str = option(
        help="A Hugging Face or timm folder, an original file, hf:OWNER/NAME or timm:NAME.",
        argument=True,
    )
    out: str = option(help="The .safetensors file to write.")
    image_size: int | None = option(
        None, "Side of the images, in pixels; positions are resized as the source's library does."
    )


def convert(options: ConvertOptions) -> VisionTransformer:
    """Write the base, and return it as loaded from the file.

    Raises:
        ValueError, OSError: the source is missing, broken or not covered, or the file exists.
    """
    with new_output(options.out) as out:
        model = load_model(options.source)
        if options.image_size is not None:
            model = at_size(model, options.image_size)
        save_model(model, out)
        return load_model(out)


@torch.no_grad()
def at_size(model: VisionTransformer, image_size: int) -> VisionTransformer:
    """Return the model rebuilt for images of this size, with resized position embeddings.

    Raises:
        ValueError: `image_size` is not a positive multiple of the patch size.
    """
    model.resize(image_size)
    config = replace(config_of(model), image_size=image_size)
    tensors = model.state_dict()
    if model.pos_embedding is not None:
        # model.positions() is already resized; those of prefix tokens are kept as they are.
        positions, n_prefix = model.positions(), model.n_pos_prefix
        grid = positions[:, -config.n_patches :]
        tensors["pos_embedding"] = torch.cat([model.pos_embedding[:, :n_prefix], grid], dim=1)
    with torch.device("meta"):
        resized = VisionTransformer(config)
    resized.load_state_dict(tensors, assign=True)
    resized.classes, resized.preprocessing = model.classes, model.preprocessing
    resized.facts = model.facts | {"positions_resized_from": model.config.image_size}
    resized.facts.pop("prepared_size", None)  # a size has been chosen
    return resized.eval()


def run(options: ConvertOptions) -> None:
    """Convert, and print a summary."""
    model, out = convert(options), shlex.quote(options.out)
    for name, value in model.facts.items():
        if not isinstance(value, dict):
            click.echo(f"{name:<15} {value}")
    click.echo(f"parameters      {sum(p.numel() for p in model.parameters()):,}")
    click.echo(f"images          {model.image_size} pixels, {model.config.n_channels} channels")
    click.echo(f"base            {out}")
    click.echo(f"use it          vitft finetune --adapter lora --base {out} --data DATA --out DIR")


command = cli.command("convert", ConvertOptions, run)
