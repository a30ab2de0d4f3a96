"""A run's facts, history and test predictions in; one HTML file that needs nothing else out."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from vitft.report.page import LOOK, write_page
from vitft.report.pictures import confusion, curves, mistakes, per_class, precisions

TILES = ("test_accuracy", "trained_share", "images_per_second", "seconds")  # facts shown large


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
    split: str = "test",
) -> None:
    """Write one HTML file that tells how a run went, replacing `path` at once or not at all.

    Args:
        facts: what summary.json holds; `*_accuracy` and `*_share` lie in 0..1.
        history: a row an epoch: epoch, train_loss, val_loss, val_accuracy, lr; may be empty.
        image: gives image i of the split, uint8 (C, height, width).
        labels: its true classes, (n,); of several labels 0 and 1, (n, n_classes).
        probabilities: the model's, (n, n_classes).
        split: what the images are: "test" or "validation".
    """
    from matplotlib import style

    n, k = len(labels), len(classes)
    assert probabilities.shape == (n, k)
    classes = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
    classes = [name.encode(errors="replace").decode() for name in classes]  # lone surrogates
    labels, probabilities = labels.long().cpu(), probabilities.detach().float().cpu().nan_to_num()
    with warnings.catch_warnings(), style.context(LOOK, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        body = _facts(facts) + curves(history)
        if labels.ndim == 2:
            body += precisions(classes, labels, probabilities, split)
        else:
            counts = torch.bincount(labels * k + probabilities.argmax(1), minlength=k * k)
            counts = counts.reshape(k, k)
            body += confusion(classes, counts) + per_class(classes, counts, split)
            body += mistakes(classes, image, labels, probabilities, split)
    write_page(path, title, body)
