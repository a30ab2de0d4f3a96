"""List the data sets that have a name: `vitft data`."""

from dataclasses import dataclass

import click

from vitft.command import options as cli
from vitft.data.named import DATASETS
from vitft.data.shapes import CLASSES
from vitft.pictures.cache import MAX_KEPT, data_folder, decoded_folder


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """List the data sets that have a name, and where they are or come from."""


def run(options: DataOptions) -> None:
    """Print a line for each set."""
    for name, classes in CLASSES.items():
        click.echo(f"{name:<14} drawn by the program, {len(classes)} classes")
    for name, (torchvision_name, *_) in DATASETS.items():
        folder = data_folder() / name
        where = f"in {folder}" if folder.is_dir() else f"downloaded to {folder} when first used"
        click.echo(f"{name:<14} torchvision's {torchvision_name}, {where}")
    click.echo("FOLDER         your own: train, val and test with CLASS/* each, or CLASS/* alone")
    click.echo("TABLE          your own: a CSV, TSV or Parquet file with path,label[,split]")
    click.echo(
        f"decoded images of your own sets are kept in {decoded_folder()}, "
        f"{MAX_KEPT / 2**30:.0f} GB at most; delete them at any time"
    )


command = cli.command("data", DataOptions, run)
