"""Find faults in a data set: `vitft check DATA`."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.check import Checked, Pair, check
from vitft.data.listing import Listing
from vitft.data.load import list_data

UNEVEN = 10  # ratio of the largest to the smallest class from which on it is reported


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Count the images of DATA by class and split; find broken, skipped and duplicate ones."""

    data: str = option(help="A folder or table of images, as in vitft finetune.", argument=True)
    json: bool = option(False, "Print JSON.")


def run(options: CheckOptions) -> None:
    """Check the data set, and print what was found.

    Raises:
        ValueError: DATA is no folder or table of images.
    """
    listing = list_data(options.data)
    found = check(listing)
    if options.json:
        click.echo(json.dumps(as_json(listing, found)))
        return
    for line in lines(listing, found):
        click.echo(line)


def as_json(listing: Listing, found: Checked) -> dict[str, Any]:
    """Return what was found as a dictionary for JSON."""

    def pairs(some: Sequence[Pair]) -> list[dict[str, Any]]:
        return [
            {"paths": [*map(str, p.paths)], "splits": p.splits, "classes": p.labels} for p in some
        ]

    counts: dict[str, dict[str, int]] = {}
    for (label, split), n in sorted(found.counts.items()):
        counts.setdefault(label, {})[split or "all"] = n
    return {
        "counts": counts,
        "broken": {str(path): why for path, why in found.broken.items()},
        "passed_over": dict(listing.skipped),
        "one_colour": [*map(str, found.one_colour)],
        "exact": pairs(found.exact),
        "near": pairs(found.near),
    }


def lines(listing: Listing, found: Checked) -> list[str]:
    """Return what was found as lines of text."""
    splits = [s for s in ("", "train", "validation", "test") if s in listing.splits]
    labels = {label for label, _ in found.counts}
    totals = {label: sum(found.counts[label, s] for s in splits) for label in labels}
    width = max(map(len, [*totals, "class"]))
    rows = [f"{'class':<{width}}" + "".join(f"{split or 'images':>12}" for split in splits)]
    for label in sorted(totals):
        counts = "".join(f"{found.counts[label, split]:>12,}" for split in splits)
        rows.append(f"{label:<{width}}{counts}")
    all_counts = "".join(f"{listing.splits.count(split):>12,}" for split in splits)
    rows.append(f"{'all':<{width}}{all_counts}\n")
    few, many = (f(totals, key=totals.__getitem__) for f in (min, max))
    if totals[many] >= UNEVEN * totals[few]:
        rows.append(
            f"uneven          {few} has {totals[few]:,} images, {many} {totals[many]:,}; see "
            "--class-weights and --sample"
        )
    rows += [f"sizes           {_sizes(found.sizes)}"] if found.sizes else []
    rows += [f"note            {note}" for note in listing.notes]
    kinds = ", ".join(f"{n} {kind}" for kind, n in listing.skipped.most_common()) or "none"
    rows.append(f"passed over     {kinds}")
    rows += _listed("broken", [*found.broken.values()])
    rows += _listed("one colour", [str(path) for path in found.one_colour])
    rows += _listed("twice", [_twice(pair) for pair in found.exact], _in_two_splits(found.exact))
    rows += _listed(
        "nearly twice", [_twice(pair) for pair in found.near], _in_two_splits(found.near)
    )
    return rows


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the median size, and the range, of pictures (width, height), in pixels."""
    low, high = (f"{w}x{h}" for w, h in (min(sizes), max(sizes)))
    usual = "x".join(str(round(statistics.median(side))) for side in zip(*sizes, strict=True))
    return usual if low == high else f"{usual} in the middle, from {low} to {high}"


def _listed(name: str, found: Sequence[str], more: str = "") -> list[str]:
    return [f"{name:<15} {len(found) or 'none'}{more}", *(f"  {line}" for line in found)]


def _in_two_splits(pairs: Sequence[Pair]) -> str:
    n = sum(pair.in_two_splits for pair in pairs)
    return f", {n} of them in two splits, where they make accuracy look better" if n else ""


def _twice(pair: Pair) -> str:
    """Return a pair as PATH (SPLIT, CLASS) = PATH (SPLIT, CLASS)."""
    files = zip(pair.paths, pair.splits, pair.labels, strict=True)
    return " = ".join(f"{path} ({s}, {c})" if s else f"{path} ({c})" for path, s, c in files)


command = cli.command("check", CheckOptions, run)
