"""Image files with labels and splits in; an `ImageSet`, which reads them when asked, out."""

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

SEPARATOR = "|"  # between the labels of an image
SPLITS = ("train", "validation", "test")
# The names of splits that users' folders and tables have -> our names.
SPLIT_NAMES = {split: split for split in SPLITS} | {"val": "validation", "valid": "validation"}
TEST_FRACTION = 0.2  # of images that have no splits
TEST_SEED = 0  # so that every run has the same test split, whatever its seed


@dataclass(frozen=True)
class ImageSet:
    """A data set with its splits, of which validation and test may be empty.

    Attributes:
        fit: how a picture becomes a tensor.
        notes: lines for the user about the set.
        several: whether an image may have several labels (multi-label); labels are then 0 and 1,
            (n, n_classes), else class indices, (n,).
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
    """Image files, called with i for the image in file i."""

    paths: list[Path]
    fit: Fit

    def __call__(self, i: int) -> Tensor:
        """Return image i, uint8 (C, height, width)."""
        return read_image(self.paths[i], self.fit)


@dataclass
class Listing:
    """Image files with the label and the split of each; the split is "" where there are none.

    Attributes:
        several: whether an image may have several labels (multi-label), with SEPARATOR between.
        skipped: number of files that were passed over, by reason.
        notes: lines for the user about what else was passed over.
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
        """Add the files and notes of another listing."""
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
            test_fraction: share of each class to hold out for testing; by default TEST_FRACTION if
                there are no splits at all, else 0.
            source_pattern: regular expression for the source of a file; see `sources_of`.
            learn: whether a model is to be trained on them; the range of 16-bit and float pictures
                is then measured, else that of `fit` is kept.

        Raises:
            ValueError: a class has no training images, `test_fraction` is not in 0..1 or there is a
                test split already, or `source_pattern` is no regular expression with a group.
        """
        labels = [self.classes_of(label) for label in self.labels]
        trained = [split in ("", "train") for split in self.splits]
        classes = self._class_names(name, labels, trained)
        fit, notes = fit_to(fit, [*compress(self.paths, trained)] or self.paths, learn=learn)
        targets = self._targets(classes, labels)
        alike = [*zip(self.labels, self.splits, strict=True)]
        sources = sources_of(self.paths, alike, source_pattern)
        names = [str(path) for path in self.paths]
        images = Images(
            self._decoder(fit),
            targets,
            sources,
            names,
            sized=partial(self._sized, fit),
            are_files=True,
        )
        by_split = {split: images.subset(self._indices(split)) for split in SPLITS}
        if test_fraction is not None and len(by_split["test"]):
            raise ValueError(f"{name} has a test split, so --test-fraction has nothing to do")
        if test_fraction is None:
            test_fraction = TEST_FRACTION if "" in self.splits else 0.0
        if test_fraction and not len(by_split["test"]):
            by_split["train"], by_split["test"] = hold_out(by_split["train"], test_fraction)
        notes = [*self._notes(classes, by_split), *notes]
        return ImageSet(
            name, tuple(classes), fit, **by_split, notes=tuple(notes), several=self.several
        )

    def _decoder(self, fit: Fit) -> Callable[[int], Tensor]:
        """Return a function of an index that returns the image, from the cache once decoded."""
        return cached(FileImages(self.paths, fit), self.paths, fit)

    def _sized(self, fit: Fit, side: int) -> Callable[[int], Tensor]:
        """Return a function as `_decoder` does, for larger images than `fit` makes.

        Their side is `side` pixels, or the median picture's shorter side if that is less.
        """
        side = max(fit.image_size, min(side, shorter_side(self.paths)))
        return self._decoder(replace(fit, image_size=side))

    def _class_names(
        self, name: str, labels: Sequence[Sequence[str]], trained: Sequence[bool]
    ) -> list[str]:
        """Return the names of the classes, sorted.

        Raises:
            ValueError: one has no training images.
        """
        known = {*chain(*labels)}
        learned = {*chain(*compress(labels, trained))} or known
        if only := sorted(known - learned):
            split = next(s for s, some in zip(self.splits, labels, strict=True) if only[0] in some)
            raise ValueError(
                f"{name}: class {only[0]} stands only in {split}; put images of it into train, or "
                "remove it"
            )
        return sorted(known)

    def _targets(self, classes: Sequence[str], labels: Sequence[Sequence[str]]) -> Tensor:
        """Return class indices (n,), or with several labels an image, 0 and 1 (n, n_classes)."""
        index = {name: i for i, name in enumerate(classes)}
        if not self.several:
            return torch.tensor([index[name] for (name,) in labels], dtype=torch.long)
        targets = torch.zeros(len(labels), len(classes), dtype=torch.uint8)
        for row, names in zip(targets, labels, strict=True):
            row[[index[name] for name in names]] = 1
        return targets

    def classes_of(self, label: str) -> list[str]:
        """Return the classes that a label names."""
        if not self.several:
            return [label]
        return [name.strip() for name in label.split(SEPARATOR) if name.strip()]

    def _indices(self, split: str) -> Tensor:
        """Return the indices of a split's images; images without a split are training images."""
        wanted = ("", "train") if split == "train" else (split,)
        return torch.tensor([i for i, s in enumerate(self.splits) if s in wanted]).long()

    def _notes(self, classes: Sequence[str], by_split: dict[str, Images]) -> list[str]:
        """Return notes for the user: skipped files, a drawn split, missing classes, duplicates."""
        lines = [*self.notes]
        if n := self.skipped.total():
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common(5))
            lines.append(f"{n} {'file is' if n == 1 else 'files are'} passed over: {kinds}")
        if "" in self.splits and len(by_split["test"]):
            lines.append(
                f"these images have no splits: {len(by_split['test'])} of {len(self.paths)} are "
                "held out as the test split, the same in every run"
            )
        tested = by_split["test"].labels
        counts = (
            tested.sum(dim=0) if self.several else tested.bincount(minlength=len(classes))
        ).tolist()
        missing = [name for name, n in zip(classes, counts, strict=True) if not n]
        if missing and len(by_split["test"]):
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            lines.append(f"no test image of {', '.join(missing[:10])}{more}")
        unseen = [*by_split["validation"].names, *by_split["test"].names]
        if twice := identical_files(unseen, by_split["train"].names):
            lines.append(
                f"{len(twice)} validation or test images are also in train, to the bit, so the "
                "accuracy looks better than it is; vitft check lists them"
            )
        return lines


def hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """Return training and test images, a `fraction` of each class for testing; 1 tests with all.

    Raises:
        ValueError: `fraction` is not in 0..1.
    """
    if fraction == 1:
        return images.subset(torch.arange(0)), images
    if not 0 <= fraction < 1:
        raise ValueError(f"test_fraction={fraction} is not in 0 <= test_fraction <= 1")
    return split(images, fraction=fraction, seed=TEST_SEED)
