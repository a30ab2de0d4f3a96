"""A run's facts, history and test predictions in; one HTML file that needs nothing else out."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from vitft.report.page import LOOK, write_page
from vitft.report.pictures import (
    confusion,
    curves,
    mistakes,
    per_class,
    precisions,
    reliability,
)

TILES = (  # facts shown large
    *("test_accuracy", "test_mean_average_precision", "test_balanced_accuracy", "test_macro_f1"),
    *("trained_share", "seconds"),
)
NAMES = {  # of facts, where the key's own words do not say it
    "n_parameters": "parameters",
    "n_trainable": "parameters that train",
    "n_train": "images to train on",
    "n_validation": "images to validate",
    "n_test": "images to test",
    "n_processes": "processes",
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "frozen_knn_accuracy": "frozen features, nearest neighbours",
    "frozen_probe_accuracy": "frozen features, linear probe",
    "test_macro_f1": "test macro F1",
    "file_bytes": "its size",
    "peak_memory_mb": "peak memory",
    "feature_seconds": "seconds for frozen features",
    "test_seconds": "seconds to test",
    "seconds": "seconds of training",
    "trained_share": "of the parameters train",
    "float32_products": "float32 products",
}
Z = 1.959964  # of a normal distribution, 95 % lie within so many deviations


def _fact(key: str, value: object) -> str:
    """Return a fact as a reader would write it, as HTML."""
    if isinstance(value, Mapping):
        return "\n".join(f"{escape(str(k))} {_fact(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact("", item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return escape("–" if value is None else str(value))
    if key.endswith(("_accuracy", "_share", "_f1", "_precision")):
        return f"{value:.2%}"
    if key.endswith("_mb"):
        return f"{value:,.0f} MB"
    if key.endswith("_bytes"):
        return f"{value / 1000:,.0f} kB"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}" if key.startswith(("n_", "images", "seconds")) else str(value)
    return f"{value:.4g}"


def _name(key: str) -> str:
    """Return what a fact is called."""
    return escape(NAMES.get(key, key.removeprefix("n_").replace("_", " ")))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the interval in which a share of n lies with 95 % (Wilson, 1927)."""
    middle, width = share + Z**2 / (2 * n), share * (1 - share) / n + Z**2 / (4 * n**2)
    return tuple((middle + side * Z * width**0.5) / (1 + Z**2 / n) for side in (-1, 1))


def _facts(facts: Mapping[str, object]) -> tuple[str, str]:
    """Return the facts that matter most as large tiles, the others as a list."""
    trained, total = facts.get("n_trainable"), facts.get("n_parameters")
    if isinstance(trained, int) and isinstance(total, int) and total:
        facts = {**facts, "trained_share": trained / total}
    facts = {**{key: facts[key] for key in TILES if key in facts}, **facts}
    tiles = others = ""
    for key, value in facts.items():
        text, label = _fact(key, value), _name(key)
        n = facts.get("n_test")
        if key in TILES and value is not None:
            if key == "test_accuracy" and isinstance(value, float) and isinstance(n, int) and n:
                low, high = wilson(value, n)
                label += f"<br>{low:.1%} to {high:.1%} by the {n:,} images (95 %)"
            tiles += f'<div class="panel"><strong>{text}</strong>{label}</div>'
        elif key not in TILES:
            others += f"<div><dt>{label}</dt><dd>{text}</dd></div>"
    others = f"<h2>All figures and options</h2><dl>{others}</dl>" if others else ""
    return f'<div class="grid" style="--w: 200px">{tiles}</div>', others


def _frozen(facts: Mapping[str, object]) -> dict[str, float]:
    """Return the accuracies of the frozen features, by name."""
    found = {name: facts.get(f"frozen_{name}_accuracy") for name in ("knn", "probe")}
    return {name: value for name, value in found.items() if isinstance(value, float)}


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
        tiles, others = _facts(facts)
        body = tiles + curves(history, _frozen(facts))
        if labels.ndim == 2:
            body += precisions(classes, labels, probabilities, split)
        else:
            counts = torch.bincount(labels * k + probabilities.argmax(1), minlength=k * k)
            counts = counts.reshape(k, k)
            body += per_class(classes, counts, split) + confusion(classes, counts)
            body += mistakes(classes, image, labels, probabilities, split)
            body += reliability(labels, probabilities, split)
        body += others
    write_page(path, title, body)
