"""The files of a data set in; their faults out: broken, duplicate, of one colour."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitft.data.listing import Listing
from vitft.pictures.decode import read_image
from vitft.pictures.preprocess import is_deep

HASH_SIDE = 8  # of a perceptual hash, 64 bits
NEAR = 4  # bits in which the hashes of nearly the same pictures differ at most
PLAIN = 2  # grey levels between the darkest and the brightest point of a picture of one colour
BLOCK = 4096  # hashes that are compared with all others at a time


@dataclass(frozen=True)
class Pair:
    """Two files that hold the same picture, and their splits and classes."""

    paths: tuple[Path, Path]
    splits: tuple[str, str]
    labels: tuple[str, str]

    @property
    def across(self) -> bool:
        """Whether they stand in two splits."""
        return self.splits[0] != self.splits[1]


@dataclass(frozen=True)
class Look:
    """What was read of a file."""

    digest: str  # of its bytes
    size: tuple[int, int] = (0, 0)
    bits: Tensor = field(default_factory=lambda: torch.zeros(0))  # perceptual hash, of -1 and 1
    plain: bool = False
    error: str = ""


@dataclass(frozen=True)
class Checked:
    """What was found in a data set.

    Attributes:
        counts: images by class and split.
        sizes: width and height of every readable image.
        broken: files that cannot be read, and why.
        plain: pictures of one colour.
        exact, near: pairs of the same bytes, and of nearly the same picture.
    """

    counts: Counter[tuple[str, str]]
    sizes: list[tuple[int, int]]
    broken: dict[Path, str]
    plain: list[Path]
    exact: list[Pair]
    near: list[Pair]


def check(listing: Listing) -> Checked:
    """Read every file of a listing once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = [*pool.map(look, listing.paths)]
    whole = [i for i, one in enumerate(looks) if not one.error]
    same: dict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(looks):
        same[one.digest].append(i)
    exact = [pair for group in same.values() for pair in combinations(group, 2)]
    known = {*exact}
    told = [i for i in whole if not looks[i].plain]
    near = [p for p in near_pairs([looks[i].bits for i in told], told) if p not in known]
    return Checked(
        counts=Counter(zip(listing.labels, listing.splits, strict=True)),
        sizes=[looks[i].size for i in whole],
        broken={listing.paths[i]: one.error for i, one in enumerate(looks) if one.error},
        plain=[listing.paths[i] for i in whole if looks[i].plain],
        exact=[_pair(listing, *pair) for pair in exact],
        near=[_pair(listing, *pair) for pair in near],
    )


def look(path: Path) -> Look:
    """Return what a file holds."""
    import imagehash  # which only this needs

    sizes: list[tuple[int, int]] = []

    def small(image: Image.Image) -> Tensor:
        sizes.append(image.size)
        image.draft("L", (8 * HASH_SIDE, 8 * HASH_SIDE))
        grey, spread = _grey(image)
        bits = imagehash.phash(grey, HASH_SIDE).hash.flatten()
        return torch.tensor([spread, *(1.0 if bit else -1.0 for bit in bits)])

    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        spread, *bits = read_image(path, small)
    except (ValueError, OSError) as error:
        return Look(digest=str(path), error=str(error))
    return Look(digest, sizes[0], torch.stack(bits), bool(spread < PLAIN))


def _grey(image: Image.Image) -> tuple[Image.Image, float]:
    """Return a picture in 256 grey levels, and how many lie between its darkest and brightest.

    A deep one is spread over all of them, since its values may be of any range.
    """
    if not is_deep(image):
        grey = image.convert("L")
        low, high = grey.getextrema()
        return grey, float(high) - float(low)  # type: ignore[arg-type]
    values = np.nan_to_num(np.asarray(image.convert("F"), np.float64), posinf=0, neginf=0)
    values -= values.min()
    values *= 255 / (values.max() or 1)
    return Image.fromarray(values.astype(np.uint8)), float(values.max())


def near_pairs(bits: Sequence[Tensor], names: Sequence[int]) -> list[tuple[int, int]]:
    """Return the names of those whose bits (64,), of -1 and 1, differ in NEAR places at most."""
    if not bits:
        return []
    hashes = torch.stack([*bits])
    found: list[tuple[int, int]] = []
    for start in range(0, len(hashes), BLOCK):
        distance = (hashes.shape[1] - hashes[start : start + BLOCK] @ hashes.T) / 2
        for i, j in (distance <= NEAR).nonzero().tolist():
            if start + i < j:
                found.append((names[start + i], names[j]))
    return found


def _pair(listing: Listing, i: int, j: int) -> Pair:
    both = (i, j)
    paths, splits, labels = (
        tuple(values[k] for k in both) for values in (listing.paths, listing.splits, listing.labels)
    )
    return Pair(paths, splits, labels)  # type: ignore[arg-type]
