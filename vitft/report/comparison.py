"""Rows of values, one a run, in; tables for the terminal or a page, and pictures, out."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vitft.report.figures import percent, wilson
from vitft.report.page import COOL, GREY, WARM, page_style, svg

COLOURS = (COOL, WARM, "#2f9e6e", "#a05cd5", "#c2a01c", "#d04a78", "#4aa3b5", GREY)
MARKS = "osD^v*"
OF_IMAGES = "%"  # format of a share of images, with digits by their number, see `percent`
# share of images -> key of the number of images that it is a share of
IMAGES = {"test_accuracy": "n_test", "val_accuracy": "n_validation", "spread": "n_validation"}
MAX_TICKS = 8
HEADINGS = {  # of keys whose words do not suffice
    "n_test": "test images",
    "n_validation": "validation images",
    "n_trainable": "trained parameters",
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
}


def cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """Return a row of headings, and the rows as text.

    Args:
        rows: values by key; one that is missing or None becomes a dash.
        columns: for every key to show, a format such as ".2%"; "" for text.
    """
    shown = [[_cell(row, key, form) for key, form in columns.items()] for row in rows]
    return [[heading(key) for key in columns], *shown]


def heading(key: str) -> str:
    """Return the heading of a column."""
    return HEADINGS.get(key, key.replace("_", " "))


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    return percent(value, row.get(IMAGES[key])) if form == OF_IMAGES else format(value, form)


def text_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the rows, see `cells`, as lines of text: columns aligned, numbers to the right."""
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


def table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], best: Mapping[str, Any] | None
) -> str:
    """Return the rows, see `cells`, as a panel with a table, the row `best` in bold."""
    text, (heads, *lines) = "", cells(rows, columns)
    for row, line in zip((None, *rows), (heads, *lines), strict=True):
        tag = "th" if row is None else "td"
        text += "<tr class=best>" if row is not None and row is best else "<tr>"
        for cell, form in zip(line, columns.values(), strict=True):
            text += f"<{tag}{' class=number' if form else ''}>{escape(cell)}</{tag}>"
        text += "</tr>"
    return f'<div class="panel"><table>{text}</table></div>'


def ranking(rows: Sequence[Mapping[str, Any]], name: str, share: str) -> str:
    """Return a panel with a bar for each row: its share of images and the 95 % interval.

    Args:
        rows: in the order of the bars; those without the share are left out.
        name: key of a row's name.
        share: key of a share of images, in 0..1.
    """
    bars = ""
    for row in rows:
        if (value := row.get(share)) is None:
            continue
        n = row.get(IMAGES[share])
        low, high = wilson(value, n) if n else (value, value)
        ends = f"{percent(low, n)} to {percent(high, n)}" if n else ""
        bar = f'<i style="--low: {low:.1%}; --x: {value:.1%}; --high: {high:.1%}"></i>'
        text = f"{percent(value, n)} <small>{ends}</small>"
        bars += f"<div><span>{escape(str(row[name]))}</span>{bar}<span>{text}</span></div>"
    return f'<div class="panel"><div class="bars wide">{bars}</div></div>' if bars else ""


def course(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    series: Callable[[Mapping[str, Any]], str],
    best: Mapping[str, Any] | None,
) -> str:
    """Return a panel with a line of points for every series, and a ring around the best point.

    Args:
        rows: one a point; those without x or y are left out.
        x: key of a number, on a logarithmic axis where all are positive.
        y: key of a share in 0..1; a row's `spread`, if any, is drawn as an error bar.
        series: row -> name of its series, "" for no entry in the legend.
        best: one of the rows; None for no ring.
    """
    from matplotlib.figure import Figure

    points = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not points:
        return ""
    with page_style():
        figure = Figure(figsize=(4.6, 3), layout="constrained")
        axes, legend = figure.subplots(), ""
        for i, name in enumerate(dict.fromkeys(map(series, points))):
            line = sorted((row for row in points if series(row) == name), key=lambda row: row[x])
            xs, ys = [row[x] for row in line], [row[y] for row in line]
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i // len(COLOURS) % len(MARKS)]
            spread = [row.get("spread") or 0 for row in line]
            axes.errorbar(xs, ys, spread, color=colour, marker=mark, markersize=4, capsize=2)
            dot = f'<b style="color: {colour}">●</b>'
            legend += f"<span>{dot} {escape(name)}</span> " if name else ""
        if best in points and best is not None:
            at = ([best[x]], [best[y]])
            axes.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=GREY)
            legend += "<span>◯ the best</span>"
        if all(row[x] > 0 for row in points):
            axes.set_xscale("log")
        values = sorted({row[x] for row in points})
        ticks = values[:: -(-len(values) // MAX_TICKS)]
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.margins(x=0.12, y=0.15)
        axes.set_xlabel(heading(x))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        return f'<div class="panel"><p class="legend">{legend}</p>{svg(figure)}</div>'
