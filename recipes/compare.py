"""Show runs side by side: `vitft compare runs/linear runs/lora runs/full`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec

from recipes.shared.places import output
from recipes.shared.runs import MAY_DIFFER
from vitft.command import options as cli
from vitft.command.options import option
from vitft.files import read_json
from vitft.records import part_of, record_of
from vitft.report.comparison import OF_IMAGES, ranking, table, text_table
from vitft.report.page import write_page

# Columns, each with the format of its values.
NAMES = {"run": "", "method": "", "data": ""}
FIGURES = {
    "trained_share": ".2%",
    "test_accuracy": OF_IMAGES,
    "n_test": ",",
    "val_accuracy": OF_IMAGES,
    "n_validation": ",",
    "images_per_second": ",.0f",
    "seconds": ",.1f",
    "file_kB": ",.0f",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Show the finished runs in and below each DIR side by side, the most accurate first.

    Runs on different images are not ranked together: each data set has a table of its own. Options
    by which the runs differ, such as lr and rank, get a column each. A run that was stopped is
    shown as such.
    """

    dir: tuple[str, ...] = option(help="Folders of runs, or of folders of runs.", argument=True)
    out: str = option("compare.html", "The page to write, with the table and a picture.")
    json: bool = option(False, "Print JSON.")


Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The fields of summary.json that are compared."""

    data: str
    n_parameters: Count
    n_trainable: Amount
    images_per_second: Amount
    seconds: Amount
    test_accuracy: Share | None
    val_accuracy: Share | None = None
    n_test: Number | None = None
    n_validation: Number | None = None
    adapter: str = "pretrain"
    feature_seconds: Amount = 0.0
    stopped: str | None = None
    file_bytes: Amount | None = None


def compare(options: CompareOptions) -> list[dict[str, Any]]:
    """Write the page, and return a row for each run, by data set, the most accurate first.

    Raises:
        ValueError, OSError: a folder holds no finished run or a broken one, or the page cannot be
            written.
    """
    found = [run for folder in options.dir for run in find_runs(folder)]
    folders = {Path(run).resolve(): run for run in reversed(found)}  # each once, by its first name
    rows = differing_options([read_run(folder) for folder in reversed(folders.values())])
    rows.sort(key=lambda row: (_images(row), -(row["test_accuracy"] or 0), -_val_accuracy(row)))
    with output(options.out) as out:
        write_page(out, "Runs side by side", "".join(map(_section, by_images(rows))))
    return rows


def by_images(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the sorted rows in groups that were measured on the same images."""
    return [list(group) for _, group in groupby(rows, key=_images)]


def _images(row: Mapping[str, Any]) -> tuple[str, int]:
    """Return the data set and the number of test images, the same for runs that can be ranked."""
    return row["data"], row["n_test"] or 0


def _val_accuracy(row: Mapping[str, Any]) -> float:
    return row["val_accuracy"] or 0.0


def _section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's HTML for the runs on one data set."""
    tested = rows[0]["test_accuracy"] is not None
    share, n = ("test_accuracy", "n_test") if tested else ("val_accuracy", "n_validation")
    images = f"{rows[0][n]:,} " if rows[0][n] else ""
    split = "test" if tested else "validation"
    columns = {name: form for name, form in _columns(rows).items() if name not in ("data", n)}
    return (
        f"<h2>{escape(rows[0]['data'])}</h2><p>Accuracy on the {images}{split} images, "
        "with its 95 % interval.</p>"
        f"{ranking(rows, 'run', share)}<br>{table(rows, columns, rows[0])}"
    )


def find_runs(folder: str) -> list[str]:
    """Return the folder itself if it is a finished run's, else the finished runs' folders below it.

    Raises:
        FileNotFoundError: there is no finished run.
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
    """Return a run's row, from its summary.json, with `options`, the content of its config.json.

    Raises:
        ValueError: one of the files is broken.
    """
    config = Path(folder, "config.json")
    try:
        summary = part_of(Summary, read_json(Path(folder, "summary.json")), "summary.json")
        options = read_json(config) if config.is_file() else {}
        options = record_of(dict[str, Any], options, "config.json")
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} is broken: {error}; run it again with --overwrite") from error
    return {
        "run": folder,
        "options": options,
        "method": summary.adapter,
        "data": Path(summary.data).name,
        "trained_share": summary.n_trainable / summary.n_parameters,
        "test_accuracy": summary.test_accuracy,  # None for a sweep's runs that are not the best
        "n_test": summary.n_test,
        "val_accuracy": summary.val_accuracy,
        "n_validation": summary.n_validation,
        "images_per_second": summary.images_per_second,
        "seconds": summary.seconds + summary.feature_seconds,
        "file_kB": None if summary.file_bytes is None else summary.file_bytes / 1000,
        "stopped": summary.stopped,
    }


def differing_options(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with a column for each option whose values differ between the runs.

    Lists, and options that only one of the runs has, are left out. If a run was stopped, a last
    column tells it.
    """
    values: dict[str, set[Any]] = {}
    for name, value in chain.from_iterable(row["options"].items() for row in rows):
        if isinstance(value, str | float | int):
            values.setdefault(name, set()).add(value)
    shown = {*NAMES, *FIGURES, "adapter", *MAY_DIFFER}
    several = [name for name, found in values.items() if len(found) > 1 and name not in shown]
    figures = [*FIGURES, *["stopped"] * any(row["stopped"] for row in rows)]
    return [
        {name: row[name] for name in NAMES}
        | {name: row["options"].get(name) for name in several}
        | {name: row[name] for name in figures}
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
    for group in by_images(rows):
        click.echo(text_table(group, _columns(rows)) + "\n")
    click.echo(f"page            {shlex.quote(options.out)}")


command = cli.command("compare", CompareOptions, run)
