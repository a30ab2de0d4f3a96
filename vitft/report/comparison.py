"""Rows that tell of several runs in; a table for the terminal, or a page with a picture out."""

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vitft.report.page import COOL, GREY, LOOK, WARM, svg, write_page

COLOURS = (COOL, WARM, "#2f9e6e", "#a05cd5", "#c2a01c", "#d04a78", "#4aa3b5", GREY)


def cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """Return a row of headings and the rows as text.

    Args:
        columns: a format such as ".2%" for every key of a row that is shown.
    """
    shown = [
        ["–" if (value := row.get(key)) is None else format(value, form) for key, form in items]
        for items in [columns.items()]
        for row in rows
    ]
    return [[key.replace("_", " ") for key in columns], *shown]


def text_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the rows as lines of text, columns aligned, numbers to the right."""
    lines = cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [form != "" for form in columns.values()]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def write_comparison(
    path: Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    x: str,
    y: str,
    series: str,
) -> None:
    """Write an HTML page with a table of the rows and a picture of `y` (0..1) against `x`.

    Args:
        columns: as for `cells`.
        x: key of a number, on a logarithmic axis where all are positive; rows without are left out
            of the picture.
        y: key of a share in 0..1; where a row has `spread`, it is drawn as a bar to both sides.
        series: key that tells which points belong to one line.
    """
    table = ""
    for i, line in enumerate(cells(rows, columns)):
        tag = "td" if i else "th"
        table += "<tr>"
        for cell, form in zip(line, columns.values(), strict=True):
            table += f"<{tag}{' class=number' if form else ''}>{escape(cell)}</{tag}>"
        table += "</tr>"
    picture = _picture(rows, x, y, series)
    write_page(
        path, title, f'{picture}<h2>Table</h2><div class="panel"><table>{table}</table></div>'
    )


def _picture(rows: Sequence[Mapping[str, Any]], x: str, y: str, series: str) -> str:
    """Return a panel with a line of points for every series, its name beside its last point."""
    from matplotlib import style
    from matplotlib.figure import Figure

    points = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not points:
        return ""
    with warnings.catch_warnings(), style.context(LOOK, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(str(row[series]) for row in points))
        for i, name in enumerate(names):
            own = sorted((row for row in points if str(row[series]) == name), key=lambda r: r[x])
            place, height = [row[x] for row in own], [row[y] for row in own]
            colour = COLOURS[i % len(COLOURS)]
            spread = [row.get("spread") or 0 for row in own]
            axes.errorbar(place, height, spread, color=colour, marker="o", markersize=4, capsize=2)
            number = isinstance(own[0][series], int | float)
            axes.annotate(
                f"{series} {name}" if number else name,
                (place[-1], height[-1]),
                (6, 3),
                textcoords="offset points",
                color=colour,
            )
        if all(row[x] > 0 for row in points):
            axes.set_xscale("log")
        if x.endswith("_share"):
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        else:
            values = sorted({row[x] for row in points})
            axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel(x.replace("_", " "), color=GREY)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        return f'<h2>{escape(y.replace("_", " "))}</h2><div class="panel">{svg(figure)}</div>'
