"""Picture files in; how their sizes and values affect their preprocessing, and duplicates, out."""

import hashlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from vitft.pictures.decode import extremes, read_header
from vitft.pictures.preprocess import Fit

N_LOOKED_AT = 50  # files whose headers are read
MUCH_LARGER = 4  # times the model's image size: the scaled picture loses much detail
MUCH_CUT = 0.1  # share of a picture; a note says where more is cut off


def fit_to(fit: Fit, paths: Sequence[Path], *, learn: bool) -> tuple[Fit, list[str]]:
    """Return `fit` with the range of values of deep pictures, and notes for the user.

    Args:
        fit: a model's preprocessing.
        paths: of pictures; broken ones are ignored.
        learn: whether to measure the range of 16-bit and float pictures, which are to train on;
            else `fit` keeps its own.
    """
    headers = _headers(paths)
    if not headers:
        return fit, []
    notes = _shape_notes(fit, [size for size, _ in headers])
    if learn and any(is_deep for _, is_deep in headers):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [pair for pair in pool.map(extremes, paths) if pair]
        low, high = min(a for a, _ in found), max(b for _, b in found)
        if low < high:
            fit = replace(fit, framing=replace(fit.framing, range=(low, high)))
            notes.append(f"16-bit or float pictures: values {low:g} to {high:g} become 0 to 255")
    return fit, notes


def shorter_side(paths: Sequence[Path]) -> int:
    """Return the median of the pictures' shorter sides, in pixels; 0 where all are broken."""
    sides = [min(size) for size, _ in _headers(paths)]
    return round(statistics.median(sides)) if sides else 0


def _headers(paths: Sequence[Path]) -> list[tuple[tuple[int, int], bool]]:
    """Return what `read_header` gives for a sample of the pictures, without the broken ones."""
    some = paths[:: len(paths) // N_LOOKED_AT + 1]
    return [found for path in some if (found := read_header(path))]


def _shape_notes(fit: Fit, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return notes on pictures of these (width, height) that lose much in preprocessing."""
    notes, side = [], fit.image_size
    width, height = (round(statistics.median(lengths)) for lengths in zip(*sizes, strict=True))
    if min(width, height) >= MUCH_LARGER * side:
        notes.append(
            f"pictures of {width}x{height} become {side}x{side}: this model sees little of them; "
            "a larger --image-size, or a base for larger images, sees more"
        )
    lost = statistics.mean(1 - min(size) / max(size) for size in sizes)
    if fit.framing.resize == "shortest" and lost > MUCH_CUT:
        notes.append(
            f"{lost:.0%} of a picture is cut off at two of its sides; --resize pad or squash keeps "
            "it all"
        )
    return notes


def identical_files(some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return each file of `some` that has the same content as one of `others`, with that one.

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
