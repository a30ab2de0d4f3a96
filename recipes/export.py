"""Write a base for another library: `vitft export --base BASE --format onnx --out FILE`."""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import adapters
from recipes.convert import at_size
from recipes.shared.model import ModelOptions, open_model
from recipes.shared.peft_folder import write_peft
from recipes.shared.places import new_output
from vitft.command import options as cli
from vitft.command.options import option
from vitft.families.check import difference as library_difference
from vitft.families.onnx import OPSET, check_onnx, write_onnx
from vitft.families.write import write_source
from vitft.files import unfinished
from vitft.model.vit import VisionTransformer

FORMATS = ("hf", "timm", "onnx", "peft-hf", "peft-timm")
MAX_DIFFERENCE = 1e-4  # of the outputs; an export that differs more is an error


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """Write a base, with an adapter baked in, as a folder or file that another library loads.

    Or write the adapter alone, as a folder that PEFT loads on the source library's model.
    """

    adapter: str | None = option(
        None, "An adapter for that base: its folder, or hf:OWNER/NAME[@REVISION]."
    )
    format: str = option(
        help="hf or timm, for a base converted from there; onnx; peft-hf or peft-timm, for an "
        "adapter on such a base."
    )
    out: str = option(help="The folder, or the .onnx file, to write.")


@torch.no_grad()
def export(options: ExportOptions) -> float:
    """Write OUT, and return the largest difference of the other library's output from ours.

    The difference is that of the written model's outputs on 3 images of noise.

    Raises:
        ValueError, OSError: a file is missing or OUT exists, the format does not suit the base, or
            the outputs differ too much.
    """
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; choose from {', '.join(FORMATS)}")
    with new_output(options.out) as out, temporarily(out) as temporary:
        model, generator = to_export(options), torch.Generator().manual_seed(0)
        shape = (3, model.config.n_channels, model.image_size, model.image_size)
        images = torch.randn(shape, generator=generator)
        difference = write_and_check(model, temporary, options.format, images)
        if not difference < MAX_DIFFERENCE:
            raise ValueError(
                f"{options.format}'s outputs differ by {difference:.1e}, over "
                f"{MAX_DIFFERENCE:g}; nothing was written"
            )
        temporary.rename(out)
        return difference


def to_export(options: ExportOptions) -> VisionTransformer:
    """Return the base, with its adapter merged, or injected if only the adapter is exported.

    Position embeddings are resized to the image size that the adapter was trained at.

    Raises:
        ValueError, OSError: a file is missing or broken, or an adapter is needed and not given.
    """
    model = open_model(options.base, options.adapter)
    if options.format.startswith("peft-"):
        if options.adapter is None:
            raise ValueError(f"--format {options.format} writes an adapter; name one by --adapter")
        return model
    if options.adapter is not None:
        adapters.merge(model)
    if model.image_size != model.config.image_size:
        model = at_size(model, model.image_size)
    return model


@contextmanager
def temporarily(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file or folder; what is there at the end is removed."""
    temporary = unfinished(out)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def write_and_check(model: VisionTransformer, out: Path, kind: str, images: torch.Tensor) -> float:
    """Write the model in a format, and return the largest difference of its outputs.

    Args:
        model: to export.
        out: the file or folder to write.
        kind: one of FORMATS.
        images: normalised, (B, C, height, width); the outputs on them are compared.
    """
    if kind == "onnx":
        write_onnx(model, out)
        return check_onnx(model, out, images)
    if kind.startswith("peft-"):
        return write_peft(model, out, kind.removeprefix("peft-"), images)
    write_source(model, out, kind)
    return library_difference(model, out, kind, images)


def run(options: ExportOptions) -> None:
    """Export, and print the largest difference."""
    difference = export(options)
    click.echo(f"{options.format:<15} {shlex.quote(options.out)}")
    if options.format == "onnx":
        click.echo(f"opset           {OPSET}; takes normalised images, any number at a time")
    click.echo(f"largest difference of its outputs on 3 images of noise   {difference:.2e}")


command = cli.command("export", ExportOptions, run)
