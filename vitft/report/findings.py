"""A model's predictions for a split in; what a report shows of them, as one JSON file, out.

The file is kept beside the report, so that the page can be written again without model and images.
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
from vitft.records import part_of
from vitft.report.thumbnails import Thumbnails

FILE = "report.json"
N_MISTAKES, N_LOOKS, N_BINS = 24, 8, 10
MAX_NAME = 24  # characters of a class name that are shown
Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
# image uint8 (C, height, width) -> attention weights of its patches (rows, columns); or None
Look = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Shown:
    """A picture with its caption."""

    name: str  # of its file; "" where there is none
    says: str  # true and predicted class, and the predicted one's probability
    picture: bytes  # PNG or JPEG
    lit: bytes = b""  # the same picture, bright where the model's attention is


@dataclass(frozen=True)
class Change:
    """How training has changed one layer's weight."""

    layer: str
    size: Amount  # Frobenius norm of the update, as a share of the weight's
    rank: Amount | None  # effective rank of the update; None for a vector


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a report shows beside a run's figures and curves.

    Attributes:
        split: which split the images are.
        n: number of images.
        classes: names, as they are shown.
        wrong: number of misclassified images.
        confusions: (true class, predicted class, number of images), where the number is not 0.
        bins: for each range of predicted probability with images: their number, mean probability,
            and share of right predictions.
        precisions: for each class its average precision and number of images, where an image may
            have several labels; else [].
        mistakes: misclassified images, those with the highest predicted probability first.
        looks: some images, and where the model's attention is in them.
        changes: of the base's layers by training; None where there was no base.
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
    def _cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """True class, predicted class and number of images (m,) of the m confusions."""
        true, predicted, n = torch.tensor(self.confusions, dtype=torch.long).view(-1, 3).unbind(1)
        return true, predicted, n

    @property
    def recalls(self) -> tuple[Tensor, Tensor]:
        """Number of images of each class (n_classes,) that are predicted as it, and of all."""
        true, predicted, n = self._cells
        none = torch.zeros(len(self.classes), dtype=torch.long)
        return none.index_add(0, true, n * (true == predicted)), none.index_add(0, true, n)

    def most_confused(self, k: int) -> list[int]:
        """Return the k classes with the most images that are predicted wrongly, in their order.

        An image counts for its class and for the one that it is predicted as.
        """
        true, predicted, n = self._cells
        n = n * (true != predicted)
        wrong = torch.zeros(len(self.classes), dtype=torch.long)
        wrong = wrong.index_add(0, true, n).index_add(0, predicted, n)
        return sorted(wrong.argsort(descending=True, stable=True)[:k].tolist())

    def counts(self, classes: Sequence[int]) -> Tensor:
        """Return the number of images (k, k) of each true (row) and predicted of k classes."""
        found = torch.zeros((len(classes),) * 2, dtype=torch.long)
        place = {label: i for i, label in enumerate(classes)}
        for true, predicted, n in self.confusions:
            if true in place and predicted in place:
                found[place[true], place[predicted]] = n
        return found

    def write(self, folder: Path) -> None:
        """Write them into a run's folder, whole or not at all."""
        text = json.dumps(msgspec.to_builtins(self), separators=(",", ":"))
        write_bytes(folder / FILE, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Findings":
        """Return what `write` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken.
        """
        found = part_of(cls, read_json(folder / FILE), FILE)
        k = len(found.classes)
        used = [i for true, predicted, _ in found.confusions for i in (true, predicted)]
        if any(i >= k for i in used) or len(found.precisions) not in (0, k):
            raise ValueError(f"{FILE}: it tells of a class that it does not name")
        names = [*found.classes, *(change.layer for change in found.changes or ())]
        if lone := [name for name in names if _encodable(name) != name]:  # none can be drawn
            raise ValueError(f"{FILE}: the name {lone[0][:80]!r} is no text")
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
        split: which split the images are.
        labels: of the n images (n,); where an image may have several, 0 and 1 (n, k).
        probabilities: the model's (n, k).
        thumbnails: pictures of the images, of which only a few are read.
        look: image, uint8 (C, height, width) -> attention weights of its patches (rows, columns).
        changes: of the base's layers by training.
    """
    assert probabilities.shape == (len(labels), len(classes))
    labels, probabilities = labels.long().cpu(), probabilities.detach().float().cpu().nan_to_num()
    complete = _several if labels.ndim == 2 else _single
    found = Findings(split=split, n=len(labels), classes=[_shown(name) for name in classes])
    found = replace(found, changes=changes)
    return complete(found, labels, probabilities, thumbnails, look)


def _single(
    found: Findings, labels: Tensor, probabilities: Tensor, thumbnails: Thumbnails, look: Look
) -> Findings:
    """Return the findings, completed for images that have one label each."""
    k, (sure, predicted) = len(found.classes), probabilities.max(1)
    right, order = predicted == labels, sure.argsort(descending=True, stable=True)
    mistakes = order[~right[order]]
    shown = mistakes[:N_MISTAKES].tolist()
    surest: dict[int, int] = {}  # class -> the right prediction of highest probability
    for i in order[right[order]].tolist():
        surest.setdefault(int(labels[i]), i)
    looked_at = [*list(surest.values())[: N_LOOKS // 2], *shown[: N_LOOKS // 2]]
    says = {}
    for i in (*looked_at, *shown):
        true, guess = found.classes[labels[i]], found.classes[predicted[i]]
        says[i] = f"{true if right[i] else f'{true} → {guess}'} {float(sure[i]):.0%}"
    pairs, counts = (labels * k + predicted).unique(return_counts=True)
    cells = zip((pairs // k).tolist(), (pairs % k).tolist(), counts.tolist(), strict=True)
    return replace(
        found,
        wrong=len(mistakes),
        confusions=list(cells),
        bins=_bins(sure, right),
        mistakes=[Shown(thumbnails.name(i), says[i], thumbnails.picture(i)) for i in shown],
        looks=_looks(thumbnails, {i: says[i] for i in looked_at}, look),
    )


def _several(
    found: Findings, labels: Tensor, probabilities: Tensor, thumbnails: Thumbnails, look: Look
) -> Findings:
    """Return the findings, completed for images that may have several labels."""
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
    return _encodable(name)


def _encodable(name: str) -> str:
    """Return a name with a question mark for each lone surrogate, which no UTF-8 has."""
    return name.encode(errors="replace").decode()


def _bins(sure: Tensor, right: Tensor) -> list[tuple[int, float, float]]:
    """Return what `Findings.bins` holds, for N_BINS ranges of probability."""
    numbers = (sure * N_BINS).long().clamp(max=N_BINS - 1)
    found = [numbers == i for i in range(N_BINS)]
    return [
        (int(here.sum()), sure[here].double().mean().item(), right[here].double().mean().item())
        for here in found
        if here.any()
    ]


def _precisions(labels: Tensor, probabilities: Tensor) -> list[tuple[float, int]]:
    """Return what `Findings.precisions` holds."""
    there = (labels > 0).sum(dim=0).tolist()
    return [
        (mean_average_precision(probabilities[:, i : i + 1], labels[:, i : i + 1]) if n else 0.0, n)
        for i, n in enumerate(there)
    ]


def _looks(thumbnails: Thumbnails, says: dict[int, str], look: Look) -> list[Shown]:
    """Return images with the model's attention; `says` has their captions by number."""
    if look is None:
        return []
    found = []
    for i, said in says.items():
        weights = look(thumbnails.images.decode(i))
        found.append(Shown(thumbnails.name(i), said, *thumbnails.look(i, weights)))
    return found
