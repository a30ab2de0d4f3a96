"""The files of a data set in; broken files, duplicates and pictures of one colour out."""

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
from vitft.pictures.preprocess import eight_bits, is_deep

HASH_SIDE = 8  # side of a perceptual hash, which has 64 bits
NEAR = 4  # the hashes of nearly the same pictures differ in at most so many bits
ONE_COLOUR = 2  # a picture whose darkest and brightest pixels are fewer grey levels apart
BLOCK = 4096  # hashes that are compared with all others at a time, which bounds the memory


@dataclass(frozen=True)
class Pair:
    """Two files that hold the same picture, and their splits and classes."""

    paths: tuple[Path, Path]
    splits: tuple[str, str]
    labels: tuple[str, str]

    @property
    def in_two_splits(self) -> bool:
        """Whether the two files are of different splits."""
        return self.splits[0] != self.splits[1]


@dataclass(frozen=True)
class FileFacts:
    """What is known of a file once it was read."""

    digest: str  # SHA-256 of its bytes
    size: tuple[int, int] = (0, 0)  # width and height in pixels
    bits: Tensor = field(default_factory=lambda: torch.zeros(0))  # perceptual hash: (64,), -1 or 1
    one_colour: bool = False
    error: str = ""  # why it cannot be read


@dataclass(frozen=True)
class Checked:
    """What was found in a data set.

    Attributes:
        counts: number of images by (class, split); one with several labels counts for each.
        sizes: width and height of every readable image, in pixels.
        broken: files that cannot be read, and why.
        one_colour: pictures of one colour.
        exact, near: pairs of the same bytes, and of nearly the same picture.
    """

    counts: Counter[tuple[str, str]]
    sizes: list[tuple[int, int]]
    broken: dict[Path, str]
    one_colour: list[Path]
    exact: list[Pair]
    near: list[Pair]


def check(listing: Listing) -> Checked:
    """Read every file of a listing once, and return what was found."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = [*pool.map(read_facts, listing.paths)]
    readable = [i for i, file in enumerate(files) if not file.error]
    same: dict[str, list[int]] = defaultdict(list)
    for i, file in enumerate(files):
        same[file.digest].append(i)
    exact = [pair for group in same.values() for pair in combinations(group, 2)]
    known = {*exact}
    # The hashes of all pictures of one colour are alike.
    hashed = [i for i in readable if not files[i].one_colour]
    near = [p for p in near_pairs([files[i].bits for i in hashed], hashed) if p not in known]
    return Checked(
        counts=Counter(
            (name, split)
            for label, split in zip(listing.labels, listing.splits, strict=True)
            for name in listing.classes_of(label)
        ),
        sizes=[files[i].size for i in readable],
        broken={listing.paths[i]: file.error for i, file in enumerate(files) if file.error},
        one_colour=[listing.paths[i] for i in readable if files[i].one_colour],
        exact=[_pair(listing, *pair) for pair in exact],
        near=[_pair(listing, *pair) for pair in near],
    )


def read_facts(path: Path) -> FileFacts:
    """Read a file; a broken one gives facts with an error."""
    import imagehash  # slow to import, and needed only here

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
        return FileFacts(digest=str(path), error=str(error))  # a path is no other file's digest
    return FileFacts(digest, sizes[0], torch.stack(bits), bool(spread < ONE_COLOUR))


def _grey(image: Image.Image) -> tuple[Image.Image, float]:
    """Return a picture in 256 grey levels, and how many lie between its darkest and brightest.

    The values of a deep picture (16 bits or floats) are stretched to 0..255, since they may have
    any range.

    Raises:
        ValueError: such a value is not finite.
    """
    if is_deep(image):
        values = np.asarray(image)
        span = float(values.min()), float(values.max())
        if span[0] != span[1]:
            image = eight_bits(image, span)
    grey = image.convert("L")
    low, high = grey.getextrema()
    return grey, float(high) - float(low)  # type: ignore[arg-type]


def near_pairs(bits: Sequence[Tensor], names: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of names whose hashes differ in at most NEAR bits.

    Args:
        bits: the hashes, each (64,), of -1 and 1.
        names: a number for each hash.
    """
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
