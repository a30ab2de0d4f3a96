"""A trained model in, the findings for its report out; a run's folder in, report.html out."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adapters
from adapters.changes import Update
from vitft.devices.processes import is_first
from vitft.evaluation.evaluate import Evaluation
from vitft.evaluation.rollout import MAX_TOKENS, n_tokens, rollout
from vitft.files import parse_json
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit
from vitft.records import record_of
from vitft.report.findings import FILE, Change, Findings, examine
from vitft.report.run import write_report
from vitft.report.thumbnails import Thumbnails


def keep_findings(
    model: VisionTransformer,
    images: Images,
    split: Literal["test", "validation"],
    result: Evaluation,
    folder: Path,
    updates: Iterable[Update] | None = None,
) -> None:
    """Write the findings that the report shows beside figures and curves.

    Every process calls it, since a sharded model needs all of them; the first one writes.

    Args:
        model: the trained model.
        images: the images that were measured.
        split: the split that they are.
        result: the model's predictions for them.
        folder: the run's folder.
        updates: what training has added to the base's weights; None where there was no base.
    """
    found = examine(
        model.classes,
        split,
        result.labels,
        result.probabilities,
        Thumbnails(images, Fit.of(model)),
        partial(rollout, model) if n_tokens(model) <= MAX_TOKENS else None,
        None if updates is None else [*_changes(updates)],
    )
    if is_first():
        found.write(folder)


def _changes(updates: Iterable[Update]) -> Iterator[Change]:
    """Yield the norm of each layer's update as a share of its weight's norm.

    The head is left out, since it is new, and so is a weight of zeros, whose norm is 0.
    """
    for name, weight, update in updates:
        if name != "head" and weight.any():
            rank = adapters.effective_rank(update) if update.ndim == 2 else None
            yield Change(name, (update.norm() / weight.norm()).item(), rank)


def make_report(folder: Path) -> str:
    """Write report.html from the files in a run's folder; return what it lacks, "" for nothing.

    Raises:
        ValueError, OSError: the folder holds no run, or one of its files is broken.
    """
    config = _facts(folder / "config.json")
    if config is None:
        raise ValueError(f"there is no run in {folder}: it has no config.json")
    facts = _facts(folder / "summary.json")
    try:
        findings = Findings.read(folder)
    except FileNotFoundError:
        findings = None
    except ValueError as error:
        raise ValueError(f"{folder} is broken: {error}; remove that file or run again") from error
    chosen = {name: value for name, value in config.items() if value and name not in (facts or {})}
    write_report(
        folder / "report.html",
        title=f"{folder.resolve().name}: {Path(str(config.get('data', ''))).name}",
        facts=(facts or {}) | {"options": chosen},
        history=_history(folder / "metrics.jsonl"),
        findings=findings,
    )
    if facts is None:
        return "there is no summary.json: the run is not done, so its figures are missing"
    if findings is None and "stopped" in facts:
        return f"the run was stopped {facts['stopped']}, so nothing was tested"
    if findings is None:
        return (
            f"there is no {FILE}, so all that shows images is missing: an older vitft kept none, "
            "nor does a sweep of runs that it does not pick"
        )
    return ""


def _facts(path: Path) -> dict[str, Any] | None:
    """Return the dictionary in a JSON file, None where there is no file.

    Raises:
        ValueError: it is no dictionary.
    """
    if not path.is_file():
        return None
    try:
        return record_of(dict[str, Any], parse_json(path.read_bytes(), finite=True), path.name)
    except ValueError as error:
        raise ValueError(f"{path.parent} is broken: {error}") from error


def _history(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of metrics.jsonl, one for each epoch that is done.

    Raises:
        ValueError: the file is broken.
    """
    if not path.is_file():
        return []
    try:
        rows = [parse_json(line, finite=True) for line in path.read_bytes().splitlines()]
        found = record_of(list[dict[str, float | None]], rows, path.name)
        if any(row.get("epoch") is None for row in found):
            raise ValueError(f"{path.name}: a line has no epoch")
        return found
    except ValueError as error:
        raise ValueError(f"{path.parent} is broken: {error}") from error
