"""A run's history and findings in, panels of HTML with inline pictures out."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

import torch

from vitft.report.figures import percent
from vitft.report.findings import Findings
from vitft.report.page import COOL, GREY, WARM, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_CLASSES = 100  # whose names are shown, at most
N_CELLS = 500  # classes of the confusion matrix, at most
CHARTS = {("train_loss", "val_loss"): ".4g", ("val_accuracy",): "%", ("lr",): ".4g"}  # of history
FROZEN = {"knn": ("nearest neighbours", ":"), "probe": ("linear probe", "--")}


def curves(
    history: Sequence[Mapping[str, float | None]],
    frozen: Mapping[str, float],
    n: int | None,
) -> str:
    """Return a panel for each chart: the last values as text, all epochs as lines.

    Args:
        history: a row an epoch, as in metrics.jsonl.
        frozen: accuracies of the frozen features by "knn" and "probe", drawn as horizontal lines.
        n: number of validation images; None where it is unknown.
    """
    from matplotlib.figure import Figure

    panels = ""
    for keys, form in CHARTS.items():
        text = partial(percent, n=n) if form == "%" else f"{{:{form}}}".format
        figure, legend = Figure(figsize=(3, 1.9), layout="constrained"), ""
        axes = figure.subplots()
        for key in keys:
            points = [(row["epoch"], y) for row in history if (y := row.get(key)) is not None]
            if points:
                colour, name = COOL if key.startswith("val") else WARM, key.replace("_", " ")
                mark = "o" if len(points) < 20 else None  # a line needs two points, a mark one
                axes.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4)
                legend += f'<b style="color: {colour}">●</b> {name} {text(points[-1][1])}&emsp;'
        for name, value in frozen.items() if "val_accuracy" in keys and legend else ():
            what, line_style = FROZEN[name]
            axes.axhline(value, color=GREY, linestyle=line_style, linewidth=1)
            legend += f"{what} of frozen features {text(value)}&emsp;"
        axes.grid(axis="y")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(f"{{x:{'.1%' if form == '%' else form}}}")
        panels += f'<div class="panel">{legend}{svg(figure)}</div>' if legend else ""
    return f'<h2>Training</h2><div class="grid" style="--w: 300px">{panels}</div>' * bool(panels)


def confusion(findings: Findings) -> str:
    """Return a panel with the confusion matrix; see `matrix`."""
    n = len(findings.classes)
    few = f" Shown are the {N_CELLS} of {n:,} classes that are confused most."
    return (
        "<h2>Confusions</h2><p>Rows are true classes, columns predicted ones. A darker cell holds "
        f"a larger share of its row.{few if n > N_CELLS else ''}</p>"
        f'<div class="panel matrix">{svg(matrix(findings))}</div>'
    )


def matrix(findings: Findings) -> "Figure":
    """Draw the confusion matrix, row true and column predicted, of the classes confused most."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    chosen = findings.most_confused(N_CELLS)
    classes, counts = [findings.classes[i] for i in chosen], findings.counts(chosen)
    n, side = len(classes), min(0.42 * len(classes), 9)  # inches
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # names lie outside; savefig.bbox="tight" includes them
    shares = counts / findings.recalls[1][chosen, None].clamp(min=1)
    depth = shares.sqrt().clamp(min=0.15) * (counts > 0)
    colours = torch.tensor([to_rgb(WARM), to_rgb(COOL)])[torch.eye(n, dtype=torch.long)]
    axes.imshow(torch.cat((colours, depth[..., None]), dim=-1).numpy(), interpolation="none")
    for i, j in counts.nonzero().tolist() if n <= 20 else ():
        axes.text(j, i, str(int(counts[i, j])), ha="center", va="center")
    shown, tilt = range(0, n, math.ceil(n / N_CLASSES)), 45 if n <= 50 else 90
    names, edges = [classes[i] for i in shown], [i - 0.5 for i in (*shown, n)]
    axes.set_yticks(shown, names)
    axes.set_xticks(shown, names, rotation=tilt, rotation_mode="anchor", ha="right", va="center")
    axes.tick_params(labelsize=min(9, max(6.5, 72 * side / n)))
    for rule in (axes.hlines, axes.vlines):
        rule(edges, -0.5, n - 0.5, color=GREY, alpha=0.3, linewidth=0.5)
    return figure


def per_class(findings: Findings) -> str:
    """Return a bar for each class's accuracy, the lowest first."""
    (right, totals), classes = findings.recalls, findings.classes
    shares = right / totals.clamp(min=1)
    # 2 puts classes without images last
    order = torch.where(totals > 0, shares, 2).argsort(stable=True)[:N_CLASSES].tolist()
    bars = ""
    for i in order:
        n, share = int(totals[i]), float(shares[i])
        text = f"{percent(share, n)} of {n:,}" if n else f"no {findings.split} image"
        bar = f'<i style="--x: {share:.1%}"></i>'
        bars += f"<div><span>{escape(classes[i])}</span>{bar}{text}</div>"
    which = "each class" if len(order) == len(classes) else f"the {len(order)} hardest classes"
    return f'<h2>Accuracy of {which}</h2><div class="panel"><div class="bars">{bars}</div></div>'


def reliability(findings: Findings) -> str:
    """Return a reliability diagram: the share of right predictions by predicted probability."""
    from matplotlib.figure import Figure

    if not findings.bins:
        return ""
    figure = Figure(figsize=(3, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1)
    counts, sure, right = zip(*findings.bins, strict=True)
    axes.scatter(sure, right, s=[200 * n / sum(counts) + 6 for n in counts], color=COOL)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="probability", ylabel="share that is right")
    axes.grid()
    return (
        f"<h2>Calibration</h2><p>Each dot stands for the {findings.split} images with about the "
        "same predicted probability; a larger dot for more of them. On the line, that share of "
        "them is right. Below it the model is too sure.</p>"
        f'<div class="grid" style="--w: 300px"><div class="panel">{svg(figure)}</div></div>'
    )


def precisions(findings: Findings) -> str:
    """Return a table of the classes' average precision, the hardest first."""
    rows = zip(findings.precisions, findings.classes, strict=True)
    # 2.0 puts classes without images last
    order = sorted((precision if n else 2.0, name, n) for (precision, n), name in rows)
    cells = ""
    for precision, name, n in order:
        text = percent(precision, n) if n else "–"
        cells += f"<div><dt>{escape(name)}</dt><dd>{text} ({n:,} images)</dd></div>"
    return f"<h2>Average precision on {findings.n:,} {findings.split} images</h2><dl>{cells}</dl>"
