"""A run's facts, history and test predictions in; one HTML file that needs nothing else out.

Matplotlib draws the pictures, which are inline SVG with text left as text: the reader's browser has
the fonts, and its light or dark mode the colours.
"""

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_MISTAKES = 24  # thumbnails shown
TILES = ("test_accuracy", "trained_share", "images_per_second", "seconds")  # facts shown large
CHARTS = (("train_loss", "val_loss"), ("val_accuracy",), ("lr",))  # columns of the history
COOL, WARM, GREY = "#3b7de0", "#e5641b", "#808890"  # GREY is replaced by the page's own grey
LOOK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": GREY, "grid.alpha": 0.25},
    **{"font.size": 9, "axes.facecolor": "none", "lines.linewidth": 1.8},
    **{"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "vitft"},
}
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2128, #e4e8ed);
  --soft: light-dark(#66707c, #97a1ad); --panel: light-dark(#f2f4f7, #1e2229) }
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, sans-serif; background: light-dark(#fff, #14171c); color: var(--ink) }
h2 { margin: 44px 0 8px; font-size: 19px } p { margin: 0 0 16px } figure, dd { margin: 0 }
p, dt, svg { color: var(--soft) } figcaption { font-size: 13px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--w), 1fr)); gap: 14px }
.panel { padding: 14px 18px; border-radius: 10px; background: var(--panel) }
.panel strong { display: block; font-size: 25px } dd { white-space: pre-line }
dl { columns: 400px; column-gap: 40px } dt { flex: 0 0 150px }
dl div { display: flex; gap: 12px; break-inside: avoid; padding: 3px 0 }
svg { display: block; max-width: 100%; height: auto; margin: auto; overflow: visible }
.grid svg { width: 100% } text { font-family: inherit !important }
img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated }
"""


def _short(name: str) -> str:
    """Return the name cut to 24 characters."""
    return name if len(name) <= 24 else name[:23] + "…"


def _fact(key: str, value: object) -> str:
    """Return a fact as a reader would write it, as HTML."""
    if isinstance(value, Mapping):
        return "\n".join(f"{escape(str(k))} {_fact(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact("", item) for item in value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return escape("–" if value is None else str(value))
    if key.endswith(("_accuracy", "_share")):
        return f"{100 * value:.2f}\xa0%"
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


def _axes(width: float, height: float) -> "Axes":
    """Return empty axes of a size in inches; what lies outside them enlarges the picture."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height)).add_axes((0, 0, 1, 1))


def _svg(axes: "Axes") -> str:
    """Return the picture as an SVG element, always the same for the same content."""
    file, figure = io.StringIO(), axes.get_figure(root=True)
    assert figure is not None
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(
        file,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.05,
        metadata=metadata,
    )
    text = file.getvalue()
    return text[text.index("<svg") :].replace(GREY, "currentColor")


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    """Return a panel a chart: the last values in words, the whole course as lines."""
    epochs = [row.get("epoch", i) for i, row in enumerate(history, 1)]
    panels = ""
    for keys in CHARTS:
        axes, legend = _axes(2.8, 1.7), ""
        scale, unit = (100, "\xa0%") if keys[0].endswith("accuracy") else (1, "")
        for key in keys:
            colour, name = COOL if key.startswith("val") else WARM, key.replace("_", " ")
            line = [math.nan if row.get(key) is None else scale * row[key] for row in history]
            legend += (
                f'<b style="color: {colour}">{name}</b> {[math.nan, *line][-1]:.4g}{unit}&emsp;'
            )
            axes.plot(
                epochs, line, color=colour, marker="o" if len(line) < 20 else "", markersize=4
            )
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(f"{{x:.4g}}{unit}")
        panels += f'<div class="panel">{legend}{_svg(axes)}</div>'
    return f'<h2>Training</h2><div class="grid" style="--w: 300px">{panels}</div>'


def _confusion(classes: Sequence[str], counts: Tensor) -> str:
    """Draw counts (n_classes, n_classes), row true and column predicted."""
    from matplotlib.colors import to_rgba

    n, cell = len(classes), min(0.42, 9 / len(classes))
    axes = _axes(n * cell, n * cell)
    depth = (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()
    cells = torch.tensor(to_rgba(WARM)).repeat(n, n, 1)  # (n_classes, n_classes, 4)
    cells[range(n), range(n)] = torch.tensor(to_rgba(COOL))
    cells[..., 3] = torch.where(counts > 0, depth.clamp(min=0.1), 0)
    axes.imshow(cells.numpy(), interpolation="none")
    if n <= 20:
        for i, j in counts.nonzero().tolist():
            colour = "white" if depth[i, j] > 0.7 else GREY
            axes.text(j, i, str(int(counts[i, j])), color=colour, ha="center", va="center")
    shown = range(0, n, math.ceil(n / 100))
    names, size = [_short(classes[i]) for i in shown], min(9, max(6.5, 72 * cell))
    tilt = 45 if n <= 50 else 90
    axes.set_yticks(shown, names, size=size)
    axes.set_xticks(
        shown, names, size=size, rotation=tilt, rotation_mode="anchor", ha="right", va="center"
    )
    axes.grid(False)
    edges = [i - 0.5 for i in [*shown, n]]
    axes.vlines(edges, -0.5, n - 0.5, color=GREY, alpha=0.25, linewidth=0.5)
    axes.hlines(edges, -0.5, n - 0.5, color=GREY, alpha=0.25, linewidth=0.5)
    return (
        "<h2>Confusions</h2><p>A row is a true class, a column a predicted one; the deeper a cell, "
        f"the larger its share of the row (square root).</p>{_svg(axes)}"
    )


def _per_class(classes: Sequence[str], counts: Tensor) -> str:
    """Draw a bar for each class, the hardest first, from counts (n_classes, n_classes)."""
    totals, hits = counts.sum(1).tolist(), counts.diagonal().tolist()
    shares = [hit / max(total, 1) for hit, total in zip(hits, totals, strict=True)]
    order = sorted(range(len(classes)), key=lambda i: (not totals[i], shares[i]))
    height, columns = math.ceil(len(order) / 3), ""
    for start in range(0, len(order), height):
        axes = _axes(3.3, 0.23 * height)
        axes.set(xlim=(-2.6, 2.6), ylim=(height - 0.5, -0.5))
        axes.set_axis_off()
        for y, i in enumerate(order[start : start + height]):
            text = f"{shares[i]:.1%} of {totals[i]:,}" if totals[i] else "no test image"
            axes.barh(y, 1, 0.4, color=GREY, alpha=0.25)
            axes.barh(y, shares[i], 0.4, color=COOL)
            axes.text(-2.6, y, _short(classes[i]), va="center")
            axes.text(1.1, y, text, va="center")
        columns += _svg(axes)
    return f'<h2>Accuracy of each class</h2><div class="grid" style="--w: 300px">{columns}</div>'


def _png(image: Tensor) -> str:
    """Return an image, uint8 (C, height, width), grey or colour, as the data URL of a small PNG."""
    from PIL import Image

    pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
    picture, file = Image.fromarray(pixels.cpu().contiguous().numpy()), io.BytesIO()
    picture.thumbnail((96, 96))  # larger than the page shows would only weigh
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _mistakes(classes: Sequence[str], images: Tensor, labels: Tensor, probabilities: Tensor) -> str:
    """Return the misclassified images, of (n, C, height, width), that the model was surest of."""
    sure, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    if not len(wrong):
        return f"<h2>Mistakes</h2><p>None among {len(labels):,} test images.</p>"
    figures = ""
    for i in wrong[sure[wrong].argsort(descending=True, stable=True)][:N_MISTAKES].tolist():
        true, guess = classes[int(labels[i])], classes[int(predicted[i])]
        figures += f'<figure title="{escape(true)} → {escape(guess)}">'
        figures += f'<img src="{_png(images[i])}" alt="">'
        figures += f"<figcaption>{escape(_short(true))} → {escape(_short(guess))} "
        figures += f"{100 * float(sure[i]):.0f}\xa0%</figcaption></figure>"
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
    history: Sequence[Mapping[str, float]],
    classes: Sequence[str],
    images: Tensor,
    labels: Tensor,
    probabilities: Tensor,
) -> None:
    """Write one HTML file that tells how a run went, replacing `path` at once or not at all.

    Args:
        facts: what summary.json holds; `*_accuracy` and `*_share` lie in 0..1.
        history: a row an epoch: epoch, train_loss, val_loss, val_accuracy, lr; may be empty.
        images: the test split, uint8 (n, C, height, width).
        labels: its true classes, (n,).
        probabilities: the model's, (n, n_classes).
    """
    from matplotlib import style

    n, k = len(labels), len(classes)
    assert (len(images), probabilities.shape) == (n, (n, k))
    classes = [name.encode(errors="replace").decode() for name in classes]
    labels, probabilities = labels.long().cpu(), probabilities.detach().float().cpu().nan_to_num()
    counts = torch.bincount(labels * k + probabilities.argmax(1), minlength=k * k).reshape(k, k)
    with warnings.catch_warnings(), style.context(LOOK, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        body = _facts(facts) + _curves(history) + _confusion(classes, counts)
        body += _per_class(classes, counts) + _mistakes(classes, images, labels, probabilities)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>"
    page = f'<!DOCTYPE html><html lang="en">{head}{body}</html>\n'
    write_bytes(path, page.encode(errors="replace"))
