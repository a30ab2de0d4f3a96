"""A run's facts, history and findings in; one self-contained HTML file out."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from vitft.report.changes import changes
from vitft.report.figures import percent, wilson
from vitft.report.findings import Findings
from vitft.report.gallery import looks, mistakes
from vitft.report.page import page_style, write_page
from vitft.report.pictures import confusion, curves, per_class, precisions, reliability

TILES = (  # facts shown large
    *("test_accuracy", "test_mean_average_precision", "test_balanced_accuracy", "test_macro_f1"),
    *("trained_share", "seconds"),
)
NAMES = {  # of facts whose keys do not suffice
    "n_parameters": "parameters",
    "n_trainable": "parameters that train",
    "n_train": "images to train on",
    "n_validation": "images to validate",
    "n_test": "images to test",
    "n_processes": "processes",
    "frozen_knn_accuracy": "frozen features, nearest neighbours",
    "frozen_probe_accuracy": "frozen features, linear probe",
    "frozen_knn_mean_average_precision": "their mean average precision, nearest neighbours",
    "frozen_probe_mean_average_precision": "their mean average precision, linear probe",
    "file_bytes": "its size",
    "peak_memory_mb": "peak memory",
    "feature_seconds": "seconds for frozen features",
    "test_seconds": "seconds to test",
    "seconds": "seconds of training",
    "trained_share": "of the parameters train",
    "float32_products": "float32 products",
}


def _fact(key: str, value: object, n: int | None = None) -> str:
    """Return a fact's value as HTML, in a readable format and with its unit.

    Args:
        key: of the fact, whose ending gives the format.
        value: a number, text, list or mapping.
        n: number of images, where the value is a share of some.
    """
    if isinstance(value, Mapping):
        return "\n".join(f"{_name(str(k))} {_fact(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact("", item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return escape("–" if value is None else str(value))
    if key.endswith(("_accuracy", "_share", "_f1", "_precision")):
        return percent(value, n)
    if key.endswith("_mb"):
        return f"{value:,.0f} MB"
    if key.endswith("_bytes"):
        return f"{value / 1000:,.0f} kB"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}" if key.startswith(("n_", "images", "seconds")) else str(value)
    return f"{value:.4g}"


def _name(key: str) -> str:
    """Return the readable name of a fact, as HTML."""
    plain = key.removeprefix("n_").replace("_", " ").replace("macro f1", "macro F1")
    if plain.startswith("val "):
        plain = f"validation {plain[4:]}"
    return escape(NAMES.get(key, plain))


def _n_images(key: str, facts: Mapping[str, object]) -> int | None:
    """Return the number of images that a share was measured on, None where it is unknown."""
    n = facts.get("n_test" if key.startswith("test_") else "n_validation")
    measured = key.startswith(("test_", "val_", "frozen_"))
    return n if measured and isinstance(n, int) and n > 0 else None


def _facts(facts: Mapping[str, object]) -> tuple[str, str]:
    """Return the facts that matter most as large tiles, the others as a list."""
    trained, total = facts.get("n_trainable"), facts.get("n_parameters")
    if isinstance(trained, int) and isinstance(total, int) and total:
        facts = {**facts, "trained_share": trained / total}
    facts = {**{key: facts[key] for key in TILES if key in facts}, **facts}
    tiles = others = ""
    for key, value in facts.items():
        n = _n_images(key, facts)
        text, label = _fact(key, value, n), _name(key)
        if key in TILES and value is not None:
            if key == "test_accuracy" and n and isinstance(value, float) and 0 <= value <= 1:
                low, high = (percent(end, n) for end in wilson(value, n))
                label += f"<br>95 % interval {low} to {high}, {n:,} images"
            tiles += f'<div class="panel"><strong>{text}</strong>{label}</div>'
        elif key not in TILES:
            others += f"<div><dt>{label}</dt><dd>{text}</dd></div>"
    others = f"<h2>All figures and options</h2><dl>{others}</dl>" if others else ""
    return f'<div class="grid" style="--w: 150px">{tiles}</div>', others


def _notes(facts: Mapping[str, object]) -> str:
    """Return what training said of the images, a paragraph each."""
    notes = facts.get("notes")
    return "".join(f"<p>{escape(str(n))}</p>" for n in notes) if isinstance(notes, list) else ""


def _frozen(facts: Mapping[str, object]) -> dict[str, float]:
    """Return the accuracies of the frozen features, by "knn" and "probe"."""
    found = {name: facts.get(f"frozen_{name}_accuracy") for name in ("knn", "probe")}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    history: Sequence[Mapping[str, float | None]],
    findings: Findings | None = None,
) -> None:
    """Write the report of a run as one HTML file, replacing `path` at once or not at all.

    Args:
        path: of the page.
        title: of the page.
        facts: the content of summary.json; `*_accuracy` and `*_share` lie in 0..1.
        history: a row an epoch: epoch, train_loss, val_loss, val_accuracy, lr; may be empty.
        findings: the model's predictions; None for a run without an evaluation.
    """
    with page_style():
        tiles, others = _facts({key: facts[key] for key in facts if key != "notes"})
        shown = "" if findings is None else _shown(findings)
        drawn = curves(history, _frozen(facts), _n_images("val_accuracy", facts))
    write_page(path, title, tiles + _notes(facts) + drawn + shown + others)


def _shown(findings: Findings) -> str:
    """Return the sections about a split's images and about the changes of the layers."""
    last = looks(findings) + changes(findings.changes)
    if findings.precisions:
        return precisions(findings) + last
    return (
        per_class(findings)
        + confusion(findings)
        + mistakes(findings)
        + reliability(findings)
        + last
    )
