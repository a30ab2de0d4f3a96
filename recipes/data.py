"""List the data sets that have a name: `vitft data`."""

from dataclasses import dataclass

import click

from vitft.command import options as cli
from vitft.data.shapes import CLASSES
from vitft.data.sources import DATASETS, data_folder


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """List the data sets that have a name, and where they are or come from."""


def run(options: DataOptions) -> None:
    """Print a line a set."""
    for name, classes in CLASSES.items():
        click.echo(f"{name:<14} drawn by the program, {len(classes)} classes")
    for name, (torchvision_name, *_) in DATASETS.items():
        folder = data_folder() / name
        where = f"in {folder}" if folder.is_dir() else f"downloaded to {folder} when first used"
        click.echo(f"{name:<14} torchvision's {torchvision_name}, {where}")
    click.echo("FOLDER         your own: FOLDER/train/CLASS/* and FOLDER/test/CLASS/*")


command = cli.command("data", DataOptions, run)
