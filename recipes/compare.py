"""Show runs side by side: `vitft compare runs/linear runs/lora runs/full`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vitft import options as cli
from vitft.comparison import text_table, write_comparison
from vitft.options import option

COLUMNS = {
    "run": "",
    "method": "",
    "data": "",
    "trained_share": ".2%",
    "test_accuracy": ".2%",
    "val_accuracy": ".2%",
    "images_per_second": ",.0f",
    "seconds": ",.0f",
    "file_kB": ",.0f",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Show the finished runs in each DIR side by side, the most accurate first."""

    dir: tuple[str, ...] = option(help="Folders of runs.", argument=True)
    out: str = option("compare.html", "The page to write, with the table and a picture.")
    json: bool = option(False, "Print JSON.")


def compare(options: CompareOptions) -> list[dict[str, Any]]:
    """Return a row a run, the most accurate first, and write the page.

    Raises:
        ValueError, OSError: a folder holds no finished run, or the page can't be written.
    """
    rows = sorted(map(read_run, options.dir), key=lambda row: -(row["test_accuracy"] or 0))
    write_comparison(
        Path(options.out),
        title="Runs side by side",
        rows=rows,
        columns=COLUMNS,
        x="trained_share",
        y="test_accuracy",
        series="run",
    )
    return rows


def read_run(folder: str) -> dict[str, Any]:
    """Return what a run's summary.json tells of it.

    Raises:
        FileNotFoundError: the run is not finished, or there is none.
        ValueError: its summary is broken.
    """
    path = Path(folder, "summary.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished run: there is no {path}")
    try:
        told = json.loads(path.read_text())
        return {
            "run": folder.rstrip("/"),
            "method": told.get("adapter", "pretrain"),
            "data": Path(told["data"]).name,
            "trained_share": told["n_trainable"] / told["n_parameters"],
            "test_accuracy": told["test_accuracy"],  # None for those a sweep did not pick
            "val_accuracy": told.get("val_accuracy"),
            "images_per_second": told["images_per_second"],
            "seconds": told["seconds"],
            "file_kB": told["file_bytes"] / 1000 if "file_bytes" in told else None,
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({error!r}); run it again with --overwrite") from error


def run(options: CompareOptions) -> None:
    """Compare and print the table."""
    rows = compare(options)
    if options.json:
        click.echo(json.dumps(rows))
        return
    click.echo(text_table(rows, COLUMNS))
    click.echo(f"\npage            {shlex.quote(options.out)}")


command = cli.command("compare", CompareOptions, run)
