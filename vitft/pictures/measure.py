"""Picture files in; what their shapes and values ask of the way to make squares of them, out."""

import hashlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from vitft.pictures.decode import extremes, heading
from vitft.pictures.preprocess import Fit

N_LOOKED_AT = 50  # files whose headers are read
LITTLE = 4  # times as wide as what becomes of it: a picture that loses much
UNEVEN = 0.1  # share of a picture that may be cut off without a word


def fit_to(fit: Fit, paths: Sequence[Path], *, learn: bool) -> tuple[Fit, list[str]]:
    """Return `fit` with the range of 16-bit and float pictures, and what a person should know.

    Args:
        fit: that of a model.
        paths: of pictures; a broken one is passed over.
        learn: whether they are to train on; if not, the range of `fit` stands.
    """
    headings = _headings(paths)
    if not headings:
        return fit, []
    notes = _shape_notes(fit, [size for size, _ in headings])
    if learn and any(is_deep for _, is_deep in headings):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [pair for pair in pool.map(extremes, paths) if pair]
        low, high = min(a for a, _ in found), max(b for _, b in found)
        if low < high:
            fit = replace(fit, framing=replace(fit.framing, range=(low, high)))
            notes.append(f"16-bit or float pictures: values {low:g} to {high:g} become 0 to 255")
    return fit, notes


def shorter_side(paths: Sequence[Path]) -> int:
    """Return the median of the pictures' shorter sides, in pixels; 0 where all are broken."""
    sides = [min(size) for size, _ in _headings(paths)]
    return round(statistics.median(sides)) if sides else 0


def _headings(paths: Sequence[Path]) -> list[tuple[tuple[int, int], bool]]:
    """Return what the headers of some pictures tell."""
    some = paths[:: len(paths) // N_LOOKED_AT + 1]
    return [found for path in some if (found := heading(path))]


def _shape_notes(fit: Fit, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return what becomes of pictures of these sizes, where they lose much."""
    notes, side = [], fit.image_size
    width, height = (round(statistics.median(lengths)) for lengths in zip(*sizes, strict=True))
    if min(width, height) >= LITTLE * side:
        notes.append(
            f"pictures of {width}x{height} become {side}x{side}: this model sees little of them; "
            "a larger --image-size, or a base for larger images, sees more"
        )
    lost = statistics.mean(1 - min(size) / max(size) for size in sizes)
    if fit.framing.resize == "shortest" and lost > UNEVEN:
        notes.append(
            f"{lost:.0%} of a picture is cut off at two of its sides; --resize pad or squash keeps "
            "it all"
        )
    return notes


def shared(some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return the files of `some` that are, to the bit, one of `others`, with that one.

    Only files of equal length are read.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for name in others:
        by_length[Path(name).stat().st_size].append(name)
    digest = cache(lambda name: hashlib.sha256(Path(name).read_bytes()).hexdigest())
    found = []
    for name in some:
        same = by_length.get(Path(name).stat().st_size, ())
        found += [(name, other) for other in same if digest(name) == digest(other)][:1]
    return found
