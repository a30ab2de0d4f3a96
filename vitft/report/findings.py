"""What a model says of a split in; what a report shows of it, as one file of JSON, out.

The file is kept beside the report, so that the page can be made again without model and images.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor

from vitft.evaluation.metrics import mean_average_precision
from vitft.files import read_json, write_bytes
from vitft.records import record_of
from vitft.report.thumbnails import Thumbnails

FILE = "report.json"
N_MISTAKES, N_LOOKS, N_BINS = 24, 8, 10
MAX_NAME = 24  # characters of a class's name that are shown
Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
# image uint8 (C, height, width) -> weights of its patches (rows, columns); None where none are told
Look = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Shown:
    """A picture: what it is and what the model says of it."""

    name: str  # of its file; "" where there is none
    says: str  # true and predicted class, and the latter's probability
    picture: bytes
    lit: bytes = b""  # the same, bright where the model looks


@dataclass(frozen=True)
class Change:
    """What training has changed of one layer's weight."""

    layer: str
    size: Amount  # of the update, as a share of the weight's own (Frobenius norms)
    rank: Amount | None  # how many directions it has; None of a vector


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a report shows beside a run's figures and curves.

    Attributes:
        split: what the images are.
        n: how many they are.
        classes: names, as they are shown.
        wrong: how many images are misclassified.
        confusions: true class, predicted class and number of images, where there are some.
        bins: of images of about one probability their number, mean probability and share of right
            ones.
        precisions: of each class the average precision and the number of images, where an image
            may have several labels; else [].
        mistakes: the misclassified images that the model is surest of.
        looks: some images, and where in them the model looks.
        changes: of the base by training; None where there is none.
    """

    split: Literal["test", "validation"]
    n: Number
    classes: list[str]
    wrong: Number = 0
    confusions: list[tuple[Number, Number, Count]] = field(default_factory=list)
    bins: list[tuple[Count, Share, Share]] = field(default_factory=list)
    precisions: list[tuple[Share, Number]] = field(default_factory=list)
    mistakes: list[Shown] = field(default_factory=list)
    looks: list[Shown] = field(default_factory=list)
    changes: list[Change] | None = None

    @property
    def counts(self) -> Tensor:
        """How many images there are (n_classes, n_classes), row true and column predicted."""
        found = torch.zeros((len(self.classes),) * 2, dtype=torch.long)
        for true, predicted, n in self.confusions:
            found[true, predicted] = n
        return found

    def write(self, folder: Path) -> None:
        """Keep them in a run's folder, whole or not at all."""
        text = json.dumps(msgspec.to_builtins(self), separators=(",", ":"))
        write_bytes(folder / FILE, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Findings":
        """Return what `write` kept.

        Raises:
            FileNotFoundError: nothing was kept.
            ValueError: the file is broken.
        """
        found = record_of(cls, read_json(folder / FILE), FILE)
        k = len(found.classes)
        told = [i for true, predicted, _ in found.confusions for i in (true, predicted)]
        if any(i >= k for i in told) or len(found.precisions) not in (0, k):
            raise ValueError(f"{FILE}: it tells of a class that it does not name")
        return found


def examine(
    classes: Sequence[str],
    split: Literal["test", "validation"],
    labels: Tensor,
    probabilities: Tensor,
    thumbnails: Thumbnails,
    look: Look = None,
    changes: list[Change] | None = None,
) -> Findings:
    """Return what a report shows of a split.

    Args:
        classes: names of the k classes.
        split: what the images are.
        labels: of the n images (n,); of several labels 0 and 1 (n, k).
        probabilities: the model's (n, k).
        thumbnails: pictures of the images, of which only a few are read.
        look: gives for image uint8 (C, height, width) the weights of its patches (rows, columns).
        changes: of the base by training.
    """
    assert probabilities.shape == (len(labels), len(classes))
    labels, probabilities = labels.long().cpu(), probabilities.detach().float().cpu().nan_to_num()
    made = _several if labels.ndim == 2 else _single
    found = Findings(split=split, n=len(labels), classes=[_shown(name) for name in classes])
    found = replace(found, changes=changes)
    return made(found, labels, probabilities, thumbnails, look)


def _single(
    found: Findings, labels: Tensor, probabilities: Tensor, thumbnails: Thumbnails, look: Look
) -> Findings:
    """Return the findings with what is shown of images that have one label each."""
    k, (sure, predicted) = len(found.classes), probabilities.max(1)
    right, order = predicted == labels, sure.argsort(descending=True, stable=True)
    mistakes = order[~right[order]]
    first = mistakes[:N_MISTAKES].tolist()
    surest: dict[int, int] = {}  # of each class
    for i in order[right[order]].tolist():
        surest.setdefault(int(labels[i]), i)
    chosen = [*list(surest.values())[: N_LOOKS // 2], *first[: N_LOOKS // 2]]
    says = {}
    for i in (*chosen, *first):
        true, told = found.classes[labels[i]], found.classes[predicted[i]]
        says[i] = f"{true if right[i] else f'{true} → {told}'} {float(sure[i]):.0%}"
    pairs, counts = (labels * k + predicted).unique(return_counts=True)
    cells = zip((pairs // k).tolist(), (pairs % k).tolist(), counts.tolist(), strict=True)
    return replace(
        found,
        wrong=len(mistakes),
        confusions=list(cells),
        bins=_bins(sure, right),
        mistakes=[Shown(thumbnails.name(i), says[i], thumbnails.picture(i)) for i in first],
        looks=_looks(thumbnails, {i: says[i] for i in chosen}, look),
    )


def _several(
    found: Findings, labels: Tensor, probabilities: Tensor, thumbnails: Thumbnails, look: Look
) -> Findings:
    """Return the findings with what is shown of images that have several labels."""
    n, says = len(labels), {}
    for i in torch.linspace(0, n - 1, min(n, N_LOOKS)).long().tolist():
        says[i] = f"{found.classes[probabilities[i].argmax()]} {float(probabilities[i].max()):.0%}"
    return replace(
        found,
        wrong=int(((probabilities > 0.5) != (labels > 0)).any(dim=1).sum()),
        precisions=_precisions(labels, probabilities),
        looks=_looks(thumbnails, says, look),
    )


def _shown(name: str) -> str:
    """Return a class's name as it is shown: not too long, and without lone surrogates."""
    name = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    return name.encode(errors="replace").decode()


def _bins(sure: Tensor, right: Tensor) -> list[tuple[int, float, float]]:
    """Return for N_BINS ranges of probability what `Findings.bins` holds."""
    places = (sure * N_BINS).long().clamp(max=N_BINS - 1)
    found = [places == i for i in range(N_BINS)]
    return [
        (int(here.sum()), sure[here].double().mean().item(), right[here].double().mean().item())
        for here in found
        if here.any()
    ]


def _precisions(labels: Tensor, probabilities: Tensor) -> list[tuple[float, int]]:
    """Return for each class what `Findings.precisions` holds."""
    there = (labels > 0).sum(dim=0).tolist()
    return [
        (mean_average_precision(probabilities[:, i : i + 1], labels[:, i : i + 1]) if n else 0.0, n)
        for i, n in enumerate(there)
    ]


def _looks(thumbnails: Thumbnails, says: dict[int, str], look: Look) -> list[Shown]:
    """Return images by number, and what is said of them, with where the model looks."""
    if look is None:
        return []
    found = []
    for i, said in says.items():
        weights = look(thumbnails.images.decode(i))
        found.append(Shown(thumbnails.name(i), said, *thumbnails.look(i, weights)))
    return found
