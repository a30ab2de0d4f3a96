"""Show runs side by side: `vitft compare runs/linear runs/lora runs/full`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click

from recipes.shared.runs import MAY_DIFFER
from vitft.command import options as cli
from vitft.command.options import option
from vitft.report.comparison import text_table, write_comparison

NAMES = {"run": "", "method": "", "data": ""}
FIGURES = {
    "trained_share": ".2%",
    "test_accuracy": ".2%",
    "val_accuracy": ".2%",
    "images_per_second": ",.0f",
    "seconds": ",.1f",
    "file_kB": ",.0f",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Show the finished runs in and below each DIR side by side, the most accurate first.

    Options by which the runs differ, such as lr and rank, get a column each.
    """

    dir: tuple[str, ...] = option(help="Folders of runs, or of folders of runs.", argument=True)
    out: str = option("compare.html", "The page to write, with the table and a picture.")
    json: bool = option(False, "Print JSON.")


def compare(options: CompareOptions) -> list[dict[str, Any]]:
    """Return a row a run, the most accurate first, and write the page.

    Raises:
        ValueError, OSError: a folder holds no finished run, or the page can't be written.
    """
    folders = dict.fromkeys(run for folder in options.dir for run in find_runs(folder))
    rows = tell_apart([read_run(folder) for folder in folders])
    rows.sort(key=lambda row: (-(row["test_accuracy"] or 0), -(row["val_accuracy"] or 0)))
    write_comparison(
        Path(options.out),
        title="Runs side by side",
        rows=rows,
        columns=_columns(rows),
        x="trained_share",
        y="test_accuracy",
        series="run",
    )
    return rows


def find_runs(folder: str) -> list[str]:
    """Return the folder where it is a finished run's, else those of the finished runs below it.

    Raises:
        FileNotFoundError: there is none.
    """
    if Path(folder, "summary.json").is_file():
        return [folder.rstrip("/")]
    below = sorted(str(path.parent) for path in Path(folder).rglob("summary.json"))
    if not below:
        raise FileNotFoundError(
            f"{folder} holds no finished run: there is no {folder}/summary.json"
        )
    return below


def read_run(folder: str) -> dict[str, Any]:
    """Return what a run's summary.json tells of it, and `options`, its config.json.

    Raises:
        ValueError: one of them is broken.
    """
    path = Path(folder, "summary.json")
    try:
        summary = json.loads(path.read_text())
        config = Path(folder, "config.json")
        return {
            "run": folder,
            "options": dict(json.loads(config.read_text())) if config.is_file() else {},
            "method": summary.get("adapter", "pretrain"),
            "data": Path(summary["data"]).name,
            "trained_share": summary["n_trainable"] / summary["n_parameters"],
            "test_accuracy": summary["test_accuracy"],  # None for those a sweep did not pick
            "val_accuracy": summary.get("val_accuracy"),
            "images_per_second": summary["images_per_second"],
            "seconds": summary["seconds"] + summary.get("feature_seconds", 0),
            "file_kB": summary["file_bytes"] / 1000 if "file_bytes" in summary else None,
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: its summary.json or config.json is broken ({error!r}); "
            "run it again with --overwrite"
        ) from error


def tell_apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with only those options whose values differ between the runs.

    Lists, and options that only one of the runs has, are left out.
    """
    values: dict[str, set[Any]] = {}
    for name, value in chain.from_iterable(row["options"].items() for row in rows):
        if isinstance(value, str | float | int):
            values.setdefault(name, set()).add(value)
    shown = {*NAMES, *FIGURES, "adapter", *MAY_DIFFER}
    several = [name for name, found in values.items() if len(found) > 1 and name not in shown]
    return [
        {name: row[name] for name in NAMES}
        | {name: row["options"].get(name) for name in several}
        | {name: row[name] for name in FIGURES}
        for row in rows
    ]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return NAMES | {name: FIGURES.get(name, "") for name in rows[0] if name not in NAMES}


def run(options: CompareOptions) -> None:
    """Compare and print the table."""
    rows = compare(options)
    if options.json:
        click.echo(json.dumps(rows))
        return
    click.echo(text_table(rows, _columns(rows)))
    click.echo(f"\npage            {shlex.quote(options.out)}")


command = cli.command("compare", CompareOptions, run)
