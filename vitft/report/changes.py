"""How training has changed each layer in; a heat map of it, blocks by layers, as HTML out."""

import re
from collections.abc import Mapping

import torch

from vitft.report.findings import Change
from vitft.report.page import COOL, WARM, svg


def changes(found: list[Change] | None) -> str:
    """Return HTML that shows how far, and in how many directions, each layer's weight has changed.

    Args:
        found: a change for each layer; None where there was no base.
    """
    if found is None:
        return ""
    title = "<h2>Where training changes the model</h2>"
    found = [change for change in found if change.size > 0]
    if not found:
        text = "No weight of the base has changed: a head has trained, or parts beside the layers."
        return f"{title}<p>{text}</p>"
    ranks = {change.layer: change.rank for change in found if change.rank is not None}
    panels = _panel(
        "Size of the update, as a share of the weight's own (Frobenius norms)",
        {change.layer: change.size for change in found},
        ".1%",
        WARM,
    )
    if ranks:
        panels += _panel(
            "Effective rank of the update: how many directions it has, weak ones counting less",
            ranks,
            ".1f",
            COOL,
        )
    return f'{title}<div class="grid" style="--w: 300px">{panels}</div>'


def _panel(title: str, values: Mapping[str, float], form: str, colour: str) -> str:
    """Return a panel with a cell for each layer, the larger its value, the deeper in colour.

    Args:
        title: of the panel.
        values: by layer, not negative.
        form: format of a value, such as ".1%".
        colour: of the cells.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    names = {layer: _row_and_column(layer) for layer in values}
    rows, columns = (list(dict.fromkeys(axis)) for axis in zip(*names.values(), strict=True))
    figure = Figure(figsize=(0.6 * len(columns), 0.26 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))  # names lie outside; savefig.bbox="tight" includes them
    cells = torch.zeros(len(rows), len(columns), 4)
    cells[..., :3] = torch.tensor(to_rgb(colour))
    largest = max(values.values()) or 1
    for layer, value in values.items():
        row, column = rows.index(names[layer][0]), columns.index(names[layer][1])
        cells[row, column, 3] = 0.1 + 0.9 * value / largest
        axes.text(column, row, format(value, form), ha="center", va="center")
    axes.imshow(cells.numpy(), interpolation="none", aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.xaxis.tick_top()
    return f'<div class="panel matrix">{title}{svg(figure)}</div>'


def _row_and_column(layer: str) -> tuple[str, str]:
    """Return the names of a layer's row and column: its block, and its name in there."""
    outer, _, name = layer.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)(\..*)?", outer)
    return (f"block {block[1]}" if block else outer), name
