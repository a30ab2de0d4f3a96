"""Make the reports of runs again from what their folders hold: `vitft report runs/signs`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from recipes.shared.report import make_report
from recipes.shared.splits import say
from recipes.sweep import make_sweep_report
from vitft.command import options as cli
from vitft.command.options import option


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Make report.html of each run or sweep in DIR again, without its model and images."""

    dir: tuple[str, ...] = option(help="Folders of runs or sweeps.", argument=True)


def report(options: ReportOptions) -> list[tuple[Path, str]]:
    """Write the pages; return the path of each and what it lacks, "" for nothing.

    Raises:
        ValueError, OSError: a folder holds no run, or one of its files is broken.
    """
    made = []
    for folder in map(Path, options.dir):
        lacks = "" if make_sweep_report(folder) else make_report(folder)
        made.append((folder / "report.html", lacks))
    return made


def run(options: ReportOptions) -> None:
    """Write the pages, and print where they are."""
    for page, lacks in report(options):
        if lacks:
            say(f"{page.parent}: {lacks}")
        click.echo(f"report          {shlex.quote(str(page))}")


command = cli.command("report", ReportOptions, run)
