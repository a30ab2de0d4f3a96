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
MOST = 1e-4  # a difference of outputs above which an export is an error


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
    """Write OUT and return the largest difference of the other library's output from ours.

    Measured on 3 images of noise, from what was written.

    Raises:
        ValueError, OSError: a file is missing or there already, the format does not suit the base,
            or the outputs differ.
    """
    if options.format not in FORMATS:
        raise ValueError(f"unknown format {options.format!r}; choose from {', '.join(FORMATS)}")
    with new_output(options.out) as out, temporarily(out) as place:
        model, generator = to_export(options), torch.Generator().manual_seed(0)
        shape = (3, model.config.n_channels, model.image_size, model.image_size)
        images = torch.randn(shape, generator=generator)
        difference = write_and_check(model, place, options.format, images)
        if not difference < MOST:
            raise ValueError(
                f"{options.format}'s outputs differ by {difference:.1e}, over {MOST:g}; nothing "
                "was written"
            )
        place.rename(out)
        return difference


def to_export(options: ExportOptions) -> VisionTransformer:
    """Return the base: with its adapter where that is written alone, else merged, at its size.

    Raises:
        ValueError, OSError: a file is missing or broken, or no adapter is named.
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
    """Yield another name for a file or folder; what still has it at the end goes."""
    place = unfinished(out)
    try:
        yield place
    finally:
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            place.unlink()


def write_and_check(model: VisionTransformer, out: Path, kind: str, images: torch.Tensor) -> float:
    """Write the model in a format; return how far what was written differs on these images."""
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
