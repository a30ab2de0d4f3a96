"""A run's facts, history and test predictions in; one HTML file that needs nothing else out.

Matplotlib draws the pictures, which are inline SVG with text left as text: the reader's browser has
the fonts, and its light or dark mode the colours.
"""

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitft.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_MISTAKES, N_CLASSES = 24, 100  # thumbnails and classes shown at most
TILES = ("test_accuracy", "trained_share", "images_per_second", "seconds")  # facts shown large
CHARTS = {("train_loss", "val_loss"): ".4g", ("val_accuracy",): ".1%", ("lr",): ".4g"}  # of history
COOL, WARM, GREY = "#3b7de0", "#e5641b", "#808890"  # GREY is replaced by the page's own grey
LOOK = {  # matplotlib's
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "grid.color"), GREY),
    **{"xtick.major.size": 0, "ytick.major.size": 0, "axes.edgecolor": "none", "grid.alpha": 0.3},
    **{"savefig.bbox": "tight", "savefig.pad_inches": 0.04, "savefig.transparent": True},
    **{"font.size": 9, "text.parse_math": False, "figure.constrained_layout.wspace": 0.06},
    **{"svg.fonttype": "none", "svg.hashsalt": "vitft"},
}
STYLE = """
:root { color-scheme: light dark; background: light-dark(#fff, #14171c) }
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, sans-serif; color: light-dark(#1c2128, #e4e8ed) }
h2 { margin: 44px 0 8px; font-size: 19px } p { margin: 0 0 16px } figure, dd { margin: 0 }
p, dt, svg { color: light-dark(#66707c, #97a1ad) } figcaption { font-size: 13px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--w), 1fr)); gap: 14px }
.panel { padding: 14px 18px; border-radius: 10px; overflow-x: auto;
  background: light-dark(#f2f4f7, #1e2229) } .grid svg { width: 100%; height: auto }
.panel strong { display: block; font-size: 25px } dd { white-space: pre-line }
dl { columns: 400px; column-gap: 40px } dt { flex: 0 0 150px }
dl div { display: flex; gap: 12px; break-inside: avoid; padding: 3px 0 }
svg { display: block; margin: auto; overflow: visible } text { font-family: inherit !important }
table { border-collapse: collapse; font-size: 14px } th { text-align: left; font-weight: 600 }
td, th { padding: 4px 18px 4px 0; border-bottom: 1px solid light-dark(#e3e7ec, #2b313a);
  white-space: nowrap } .number { text-align: right; font-variant-numeric: tabular-nums }
img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated }
"""


def _fact(key: str, value: object) -> str:
    """Return a fact as a reader would write it, as HTML."""
    if isinstance(value, Mapping):
        return "\n".join(f"{escape(str(k))} {_fact(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact("", item) for item in value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return escape("–" if value is None else str(value))
    if key.endswith(("_accuracy", "_share")):
        return f"{value:.2%}"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}" if key.startswith(("n_", "images", "seconds")) else str(value)
    return f"{value:.4g}"


def _facts(facts: Mapping[str, object]) -> str:
    """Return the facts that matter most as large tiles, the others as a list."""
    trained, total = facts.get("n_trainable"), facts.get("n_parameters")
    if isinstance(trained, int) and isinstance(total, int) and total:
        facts = {**facts, "trained_share": trained / total}
    facts = {**{key: facts[key] for key in TILES if key in facts}, **facts}
    tiles = others = ""
    for key, value in facts.items():
        text, label = _fact(key, value), escape(key.removeprefix("n_").replace("_", " "))
        if key in TILES:
            tiles += f'<div class="panel"><strong>{text}</strong>{label}</div>'
        else:
            others += f"<div><dt>{label}</dt><dd>{text}</dd></div>"
    return f'<div class="grid" style="--w: 200px">{tiles}</div><dl>{others}</dl>'


def svg(figure: "Figure") -> str:
    """Return the figure as an SVG element, always the same for the same content."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(GREY, "currentColor")


def _curves(history: Sequence[Mapping[str, float | None]]) -> str:
    """Return a panel a chart: the last values in words, the whole course as lines."""
    from matplotlib.figure import Figure

    panels = ""
    for keys, form in CHARTS.items():
        figure, legend = Figure(figsize=(3, 1.9), layout="constrained"), ""
        axes = figure.subplots()
        for key in keys:
            points = [(row["epoch"], y) for row in history if (y := row.get(key)) is not None]
            if points:
                colour, name = COOL if key.startswith("val") else WARM, key.replace("_", " ")
                mark = "o" if len(points) < 20 else None  # a line needs two points, a mark one
                axes.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4)
                legend += f'<b style="color: {colour}">{name}</b> {points[-1][1]:{form}}&emsp;'
        axes.grid(axis="y")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(f"{{x:{form}}}")
        panels += f'<div class="panel">{legend}{svg(figure)}</div>' if legend else ""
    return f'<h2>Training</h2><div class="grid" style="--w: 300px">{panels}</div>' * bool(panels)


def _confusion(classes: Sequence[str], counts: Tensor) -> str:
    """Draw counts (n_classes, n_classes), row true and column predicted."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    n, side = len(classes), min(0.42 * len(classes), 9)  # inches
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # the names lie outside, where savefig.bbox makes room
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    depth = shares.sqrt().clamp(min=0.15) * (counts > 0)
    colours = torch.tensor([to_rgb(WARM), to_rgb(COOL)])[torch.eye(n, dtype=torch.long)]
    axes.imshow(torch.cat((colours, depth[..., None]), dim=-1).numpy(), interpolation="none")
    for i, j in counts.nonzero().tolist() if n <= 20 else ():
        colour = "white" if depth[i, j] > 0.7 else GREY
        axes.text(j, i, str(int(counts[i, j])), color=colour, ha="center", va="center")
    shown, tilt = range(0, n, math.ceil(n / N_CLASSES)), 45 if n <= 50 else 90
    names, edges = [classes[i] for i in shown], [i - 0.5 for i in (*shown, n)]
    axes.set_yticks(shown, names)
    axes.set_xticks(shown, names, rotation=tilt, rotation_mode="anchor", ha="right", va="center")
    axes.tick_params(labelsize=min(9, max(6.5, 72 * side / n)))
    for rule in (axes.hlines, axes.vlines):
        rule(edges, -0.5, n - 0.5, color=GREY, alpha=0.3, linewidth=0.5)
    return (
        "<h2>Confusions</h2><p>A row is a true class, a column a predicted one; the deeper a cell, "
        f'the larger its share of the row (square root).</p><div class="panel">{svg(figure)}</div>'
    )


def _per_class(classes: Sequence[str], counts: Tensor) -> str:
    """Draw a bar a class, the hardest first, from counts (n_classes, n_classes)."""
    from matplotlib.figure import Figure

    totals, shares = counts.sum(1), counts.diagonal() / counts.sum(1).clamp(min=1)
    order = torch.where(totals > 0, shares, 2).argsort(stable=True)[:N_CLASSES]
    height = math.ceil(len(order) / 2)
    figure = Figure(figsize=(10.7, 0.24 * height + 0.1), layout="constrained")
    for axes, some in zip(figure.subplots(1, 2), (order[:height], order[height:]), strict=True):
        found = zip(shares[some].tolist(), totals[some].tolist(), strict=True)
        texts = [f"{share:.1%} of {n:,}" if n else "no test image" for share, n in found]
        behind = axes.barh(range(len(some)), 1, 0.4, color=GREY, alpha=0.25)
        axes.bar_label(behind, texts, padding=5)
        axes.barh(range(len(some)), shares[some].numpy(), 0.4, color=COOL)
        axes.set_yticks(range(len(some)), [classes[i] for i in some])
        axes.set(xticks=(), xlim=(0, 1), ylim=(height - 0.5, -0.5))
    which = "each class" if len(order) == len(classes) else f"the {len(order)} hardest classes"
    return f'<h2>Accuracy of {which}</h2><div class="panel">{svg(figure)}</div>'


def _png(image: Tensor) -> str:
    """Return an image, uint8 (C, height, width), grey or colour, as the data URL of a small PNG."""
    from PIL import Image

    pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
    picture, file = Image.fromarray(pixels.cpu().contiguous().numpy()), io.BytesIO()
    picture.thumbnail((96, 96))  # larger than the page shows would only weigh
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _mistakes(
    classes: Sequence[str], image: Callable[[int], Tensor], labels: Tensor, probabilities: Tensor
) -> str:
    """Return the misclassified images that the model was surest of."""
    sure, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    if not len(wrong):
        return f"<h2>Mistakes</h2><p>None among {len(labels):,} test images.</p>"
    figures = ""
    for i in wrong[sure[wrong].argsort(descending=True, stable=True)][:N_MISTAKES].tolist():
        names = f"{classes[int(labels[i])]} → {classes[int(predicted[i])]}"
        figures += f'<figure><img src="{_png(image(i))}" alt="">'
        figures += f"<figcaption>{escape(names)} {float(sure[i]):.0%}</figcaption></figure>"
    return (
        f"<h2>The surest mistakes</h2><p>{len(wrong):,} of {len(labels):,} test images are wrongly "
        "classified; shown as true → predicted class, with the probability of the latter.</p>"
        f'<div class="grid" style="--w: 124px">{figures}</div>'
    )


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    history: Sequence[Mapping[str, float | None]],
    classes: Sequence[str],
    image: Callable[[int], Tensor],
    labels: Tensor,
    probabilities: Tensor,
) -> None:
    """Write one HTML file that tells how a run went, replacing `path` at once or not at all.

    Args:
        facts: what summary.json holds; `*_accuracy` and `*_share` lie in 0..1.
        history: a row an epoch: epoch, train_loss, val_loss, val_accuracy, lr; may be empty.
        image: gives image i of the test split, uint8 (C, height, width).
        labels: its true classes, (n,).
        probabilities: the model's, (n, n_classes).
    """
    from matplotlib import style

    n, k = len(labels), len(classes)
    assert probabilities.shape == (n, k)
    classes = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
    classes = [name.encode(errors="replace").decode() for name in classes]  # lone surrogates
    labels, probabilities = labels.long().cpu(), probabilities.detach().float().cpu().nan_to_num()
    counts = torch.bincount(labels * k + probabilities.argmax(1), minlength=k * k).reshape(k, k)
    with warnings.catch_warnings(), style.context(LOOK, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        body = _facts(facts) + _curves(history) + _confusion(classes, counts)
        body += _per_class(classes, counts) + _mistakes(classes, image, labels, probabilities)
    write_page(path, title, body)


def write_page(path: Path, title: str, body: str) -> None:
    """Write HTML that needs nothing else, replacing `path` at once or not at all."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>"
    page = f'<!DOCTYPE html><html lang="en">{head}{body}</html>\n'
    write_bytes(path, page.encode(errors="replace"))
