"""Look for faults of a data set: `vitft check DATA`."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.check import Checked, Pair, check
from vitft.data.listing import Listing
from vitft.data.load import list_data

UNEVEN = 10  # times as many images in one class as in another


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Count the images of DATA by class and split; find broken, skipped and duplicate ones."""

    data: str = option(help="A folder or table of images, as in vitft finetune.", argument=True)
    json: bool = option(False, "Print JSON.")


def run(options: CheckOptions) -> None:
    """Check, and print what was found."""
    listing = list_data(options.data)
    found = check(listing)
    if options.json:
        click.echo(json.dumps(as_json(listing, found)))
        return
    for line in lines(listing, found):
        click.echo(line)


def as_json(listing: Listing, found: Checked) -> dict[str, Any]:
    """Return what was found, for programs."""

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
    """Return what was found, for people."""
    splits = [s for s in ("", "train", "validation", "test") if s in listing.splits]
    totals = {label: sum(found.counts[label, s] for s in splits) for label in {*listing.labels}}
    width = max(map(len, [*totals, "class"]))
    rows = [f"{'class':<{width}}" + "".join(f"{split or 'images':>12}" for split in splits)]
    for label in sorted(totals):
        counts = "".join(f"{found.counts[label, split]:>12,}" for split in splits)
        rows.append(f"{label:<{width}}{counts}")
    sums = "".join(f"{listing.splits.count(split):>12,}" for split in splits)
    rows.append(f"{'all':<{width}}{sums}\n")
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
    rows += _listed("broken", [why for why in found.broken.values()])
    rows += _listed("one colour", [str(path) for path in found.one_colour])
    rows += _listed("twice", [_twice(pair) for pair in found.exact], _across(found.exact))
    rows += _listed("nearly twice", [_twice(pair) for pair in found.near], _across(found.near))
    return rows


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    low, high = (f"{w}x{h}" for w, h in (min(sizes), max(sizes)))
    usual = "x".join(str(round(statistics.median(side))) for side in zip(*sizes, strict=True))
    return usual if low == high else f"{usual} in the middle, from {low} to {high}"


def _listed(name: str, found: Sequence[str], more: str = "") -> list[str]:
    return [f"{name:<15} {len(found) or 'none'}{more}", *(f"  {line}" for line in found)]


def _across(pairs: Sequence[Pair]) -> str:
    n = sum(pair.in_two_splits for pair in pairs)
    return f", {n} of them in two splits, where they make accuracy look better" if n else ""


def _twice(pair: Pair) -> str:
    places = [f"{Path(p)} ({s}, {c})" if s else f"{Path(p)} ({c})" for p, s, c in _three(pair)]
    return " = ".join(places)


def _three(pair: Pair) -> Sequence[tuple[Path, str, str]]:
    return [*zip(pair.paths, pair.splits, pair.labels, strict=True)]


command = cli.command("check", CheckOptions, run)
