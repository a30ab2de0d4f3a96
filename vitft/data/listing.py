"""Image files with labels and splits in, none of them read yet; an `ImageSet` out."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress
from pathlib import Path

import torch
from torch import Tensor

from vitft.data.sources import sources_of
from vitft.data.split import split
from vitft.pictures.cache import cached
from vitft.pictures.decode import read_image
from vitft.pictures.images import Images
from vitft.pictures.measure import fit_to, identical_files, shorter_side
from vitft.pictures.preprocess import Fit

SEPARATOR = "|"  # of several labels
SPLITS = ("train", "validation", "test")
TEST_FRACTION = 0.2  # of images that nobody has split
TEST_SEED = 0  # one test split for every run, whatever its seed


@dataclass(frozen=True)
class ImageSet:
    """A data set with its splits, of which validation and test may be empty.

    Attributes:
        fit: what its pictures go through.
        notes: what a person should know of it, a line each.
        several: whether an image may have several labels, which are then 0 and 1 (n, n_classes).
    """

    name: str
    classes: tuple[str, ...]
    fit: Fit
    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()
    several: bool = False

    @classmethod
    def of(
        cls, name: str, classes: Sequence[str], fit: Fit, train: Images, test: Images
    ) -> "ImageSet":
        """Return a set that comes without a validation split."""
        return cls(name, tuple(classes), fit, train, train.subset(torch.arange(0)), test)


@dataclass(frozen=True)
class FileImages:
    """Image files; called with i it reads file i."""

    paths: list[Path]
    fit: Fit

    def __call__(self, i: int) -> Tensor:
        """Return image i, uint8 (C, height, width)."""
        return read_image(self.paths[i], self.fit)


@dataclass
class Listing:
    """Image files, their classes, and the split of each: "" where nobody has split them.

    Attributes:
        several: whether an image may have several labels, with SEPARATOR between them.
        skipped: how many files were passed over, by the reason.
        notes: what else was passed over.
    """

    paths: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    several: bool = False

    def add(self, paths: Sequence[Path], label: str, split: str) -> None:
        """Add files of one class and split."""
        self.paths += paths
        self.labels += [label] * len(paths)
        self.splits += [split] * len(paths)

    def join(self, other: "Listing") -> None:
        """Add what another holds."""
        self.paths += other.paths
        self.labels += other.labels
        self.splits += other.splits
        self.skipped += other.skipped
        self.notes += other.notes
        self.several |= other.several

    def image_set(
        self,
        name: str,
        fit: Fit,
        *,
        test_fraction: float | None = None,
        source_pattern: str | None = None,
        learn: bool = True,
    ) -> ImageSet:
        """Return the files as a set; a test split is drawn where there is none.

        Args:
            name: of the set.
            fit: makes a tensor of a picture.
            test_fraction: share of each class to test with; by default TEST_FRACTION of images that
                nobody has split, and none where only validation is given.
            source_pattern: see `sources_of`.
            learn: whether a model is to learn from them, so that they tell the range of values.

        Raises:
            ValueError: a class has no training images, or `test_fraction` is not in 0..1 or not
                needed.
        """
        labels = [self._classes(label) for label in self.labels]
        trained = [part in ("", "train") for part in self.splits]
        classes = self._known(name, labels, trained)
        fit, notes = fit_to(fit, [*compress(self.paths, trained)] or self.paths, learn=learn)
        numbers = self._numbers(classes, labels)
        alike = [*zip(self.labels, self.splits, strict=True)]
        sources = sources_of(self.paths, alike, source_pattern)
        names = [str(path) for path in self.paths]
        images = Images(
            self._decoder(fit),
            numbers,
            sources,
            names,
            sized=partial(self._sized, fit),
            are_files=True,
        )
        parts = {part: images.subset(self._indices(part)) for part in SPLITS}
        if test_fraction is not None and len(parts["test"]):
            raise ValueError(f"{name} has a test split, so --test-fraction has nothing to do")
        if test_fraction is None:
            test_fraction = TEST_FRACTION if "" in self.splits else 0.0
        if test_fraction and not len(parts["test"]):
            parts["train"], parts["test"] = held_out(parts["train"], test_fraction)
        notes = [*self._lines(classes, parts), *notes]
        return ImageSet(
            name, tuple(classes), fit, **parts, notes=tuple(notes), several=self.several
        )

    def _decoder(self, fit: Fit) -> Callable[[int], Tensor]:
        """Return index -> image, which is decoded once and kept."""
        return cached(FileImages(self.paths, fit), self.paths, fit)

    def _sized(self, fit: Fit, side: int) -> Callable[[int], Tensor]:
        """Return index -> image of at most this side, if the pictures are as large."""
        side = max(fit.image_size, min(side, shorter_side(self.paths)))
        return self._decoder(replace(fit, image_size=side))

    def _known(
        self, name: str, labels: Sequence[Sequence[str]], trained: Sequence[bool]
    ) -> list[str]:
        """Return the classes, in the order of their names.

        Raises:
            ValueError: one has no training images.
        """
        known = {*chain(*labels)}
        learned = {*chain(*compress(labels, trained))} or known
        if only := sorted(known - learned):
            part = next(p for p, some in zip(self.splits, labels, strict=True) if only[0] in some)
            raise ValueError(
                f"{name}: class {only[0]} stands only in {part}; put images of it into train, or "
                "remove it"
            )
        return sorted(known)

    def _numbers(self, classes: Sequence[str], labels: Sequence[Sequence[str]]) -> Tensor:
        """Return class indices (n,); of several labels an image, 0 and 1 (n, n_classes)."""
        place = {name: i for i, name in enumerate(classes)}
        if not self.several:
            return torch.tensor([place[name] for (name,) in labels], dtype=torch.long)
        numbers = torch.zeros(len(labels), len(classes), dtype=torch.uint8)
        for row, names in zip(numbers, labels, strict=True):
            row[[place[name] for name in names]] = 1
        return numbers

    def _classes(self, label: str) -> list[str]:
        """Return the classes that a label names."""
        if not self.several:
            return [label]
        return [name.strip() for name in label.split(SEPARATOR) if name.strip()]

    def _indices(self, part: str) -> Tensor:
        wanted = ("", "train") if part == "train" else (part,)
        return torch.tensor([i for i, s in enumerate(self.splits) if s in wanted]).long()

    def _lines(self, classes: Sequence[str], parts: dict[str, Images]) -> list[str]:
        """Return notes for the user: skipped files, drawn splits, missing classes."""
        lines = [*self.notes]
        if n := self.skipped.total():
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common(5))
            lines.append(f"{n} {'file is' if n == 1 else 'files are'} passed over: {kinds}")
        if "" in self.splits and len(parts["test"]):
            lines.append(
                f"these images have no splits: {len(parts['test'])} of {len(self.paths)} are held "
                "out as the test split, the same in every run"
            )
        tested = parts["test"].labels
        counts = (
            tested.sum(dim=0) if self.several else tested.bincount(minlength=len(classes))
        ).tolist()
        missing = [name for name, n in zip(classes, counts, strict=True) if not n]
        if missing and len(parts["test"]):
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            lines.append(f"no test image of {', '.join(missing[:10])}{more}")
        unseen = [*parts["validation"].names, *parts["test"].names]
        if twice := identical_files(unseen, parts["train"].names):
            lines.append(
                f"{len(twice)} validation or test images are also in train, to the bit, so the "
                "accuracy looks better than it is; vitft check lists them"
            )
        return lines


def held_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """Return images to train on and to test with; a `fraction` of 1 tests with all.

    Raises:
        ValueError: `fraction` is not in 0..1.
    """
    if fraction == 1:
        return images.subset(torch.arange(0)), images
    if not 0 <= fraction < 1:
        raise ValueError(f"test_fraction={fraction} is not in 0 <= test_fraction <= 1")
    return split(images, fraction=fraction, seed=TEST_SEED)
