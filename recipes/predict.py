"""Classify image files: `vitft predict --base BASE --adapter DIR cat.jpg`."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from recipes.shared.classifier import Classes, Classifier, best_of, expand
from recipes.shared.model import ModelOptions
from recipes.shared.places import output
from recipes.shared.splits import on_device
from vitft.bars import progress_bar
from vitft.command import options as cli
from vitft.command.options import option
from vitft.command.streams import BREAKS
from vitft.command.telling import complain
from vitft.data.load import load_data
from vitft.evaluation.probe import neighbours
from vitft.evaluation.task import TASKS
from vitft.files import write_bytes
from vitft.pictures.images import Images

FORMATS = ("text", "csv", "json")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Print the most probable classes of each IMAGE, by each adapter if several are given."""

    image: tuple[str, ...] = option(help="Image files, or folders of them.", argument=True)
    adapter: tuple[str, ...] = option(
        (),
        "An adapter for that base: its folder, or hf:OWNER/NAME[@REVISION]; may be given several "
        "times.",
        repeated=True,
    )
    top: int = option(5, "How many classes to print.")
    threshold: float = option(0.0, "Print no class less probable than this, 0 to 1.")
    knn: str | None = option(
        None,
        "Answer by the nearest neighbours among the training images of this data set, not by the "
        "head.",
    )
    csv: bool = option(False, "Print CSV: image, adapter, rank, class, probability.")
    json: bool = option(False, "Print JSON.")
    out: str | None = option(None, "Write to this file instead: .csv, .json or text.")
    skip_broken: bool = option(
        False, "Exit with status 0 even if images are broken, and leave them out of --knn."
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")


def predict(options: PredictOptions) -> Iterator[tuple[str, list[Classes] | ValueError | OSError]]:
    """Yield each image's path with its classes by each adapter, or by the base if there is none.

    Several adapters are computed together, in one pass through the base. A missing or broken image
    gives its error instead of its classes, and the others follow.

    Raises:
        ValueError, OSError: a model's file is missing, adapters can't be stacked, or an option is
            out of its range.
    """
    if options.top < 1:
        raise ValueError(f"top={options.top} is not positive; leave it out for 5")
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"threshold={options.threshold} is not in 0 <= threshold <= 1")
    classifier = Classifier(options.base, options.adapter, device=options.device)
    answer, classes = classifier.answer, classifier.all_classes
    if options.knn is not None:
        neighbour = Neighbours(classifier, options.knn, skip_broken=options.skip_broken)
        answer, classes = neighbour.answer, [neighbour.classes]
    for read in classifier.read_each(options.image):
        readable = [image for _, image in read if isinstance(image, Tensor)]
        rows = iter(answer(torch.stack(readable)) if readable else ())
        for path, image in read:
            if isinstance(image, Exception):
                yield path, image
                continue
            found = [best_of(p, c, options.top) for p, c in zip(next(rows), classes, strict=True)]
            yield path, [_above(one, options.threshold) for one in found]


class Neighbours:
    """Classification by the labels of the nearest features (k-NN, arXiv:1805.01978).

    Args:
        classifier: gives the features.
        data: the data set whose training images are the neighbours; what `load_data` takes.
        skip_broken: leave out broken images of it.

    Raises:
        ValueError, OSError: the set is missing or broken, or has no readable training image.
    """

    def __init__(self, classifier: Classifier, data: str, *, skip_broken: bool) -> None:
        self.classifier = classifier
        found = load_data(data, classifier.fit, learn=classifier.fit.framing.range is None)
        classifier.fit = found.fit  # with the set's range of 16-bit pictures, if it has any
        images = on_device(found.train, torch.device("cpu"), skip_broken=skip_broken)
        if not len(images):
            raise ValueError(f"{data} has no readable image to train on, so --knn has none to find")
        self.classes = found.classes
        self.features = torch.cat([classifier.embed(x) for x in _all(images, classifier)])
        task = TASKS["several" if found.several else "one"]()
        self.targets = task.targets(images.labels, len(self.classes))

    def answer(self, images: Tensor) -> Tensor:
        """Return the share of the neighbours that are of each class, (B, 1, n_classes)."""
        return neighbours(self.features, self.targets, self.classifier.embed(images))[:, None]


def _all(images: Images, classifier: Classifier) -> Iterator[Tensor]:
    order, cpu = torch.arange(len(images)), torch.device("cpu")
    for batch, _ in images.batches(order.split(classifier.batch_size), cpu):
        yield batch


def _above(found: Classes, threshold: float) -> Classes:
    return {name: p for name, p in found.items() if p >= threshold}


def shown(rows: Sequence[dict[str, Any]], kind: str, *, first: bool = True) -> str:
    """Return answers as text, CSV or JSON.

    Args:
        rows: each has "image", a path, and "adapters", the classes by adapter; with no or one
            adapter, its name is "".
        kind: one of FORMATS.
        first: whether to begin CSV with a header.
    """
    if kind == "json":
        plain = [
            {"image": row["image"], "classes": row["adapters"][""]}
            if row["adapters"].keys() == {""}
            else row
            for row in rows
        ]
        return json.dumps(plain) + "\n"
    text = io.StringIO()
    if kind == "csv":
        writer = csv.writer(text, lineterminator="\n")
        if first:
            writer.writerow(["image", "adapter", "rank", "class", "probability"])
        for row in rows:
            for name, found in row["adapters"].items():
                for rank, (label, p) in enumerate(found.items(), start=1):
                    writer.writerow([row["image"], name, rank, label, f"{p:.6f}"])
        return text.getvalue()
    for row in rows:
        for name, found in row["adapters"].items():
            classes = "  ".join(f"{label} {p:.1%}" for label, p in found.items()) or "none"
            line = "  ".join(part for part in (row["image"], name, classes) if part)
            text.write(line.translate(BREAKS) + "\n")
    return text.getvalue()


def run(options: PredictOptions) -> None:
    """Classify, and print a line for each image and adapter as soon as it is computed.

    Raises:
        ValueError, OSError: an option is wrong, or images were missing or broken; the others have
            been classified.
    """
    if options.csv and options.json:
        raise ValueError("--csv and --json are two formats; choose one")
    kind = "csv" if options.csv else "json" if options.json else "text"
    if options.out is not None and kind == "text":
        kind = {".csv": "csv", ".json": "json"}.get(Path(options.out).suffix.lower(), kind)
    options = replace(options, image=tuple(expand(options.image)))
    names = options.adapter if len(options.adapter) > 1 else ("",)
    rows: list[dict[str, Any]] = []
    broken: list[tuple[str, ValueError | OSError]] = []
    with progress_bar(len(options.image)) as bar:
        for path, answers in predict(options):
            bar.update()
            bar.clear()  # so that the line below does not stand behind the bar
            if isinstance(answers, Exception):
                broken.append((path, answers))
                if len(options.image) > 1 or options.skip_broken:
                    complain(f"skipped: {answers}")
                continue
            row = {"image": path, "adapters": dict(zip(names, answers, strict=True))}
            rows.append(row)
            if options.out is None and kind != "json":
                click.echo(shown([row], kind, first=len(rows) == 1), nl=False)
    if options.out is not None:
        with output(options.out) as out:
            write_bytes(out, shown(rows, kind).encode(errors="backslashreplace"))
    elif kind == "json":
        click.echo(shown(rows, kind), nl=False)
    if broken and not options.skip_broken:
        if len(options.image) == 1:
            raise broken[0][1]
        named = ", ".join(path for path, _ in broken[:10]) + (", ..." if len(broken) > 10 else "")
        raise ValueError(
            f"{len(broken)} of {len(options.image)} images are missing or broken: {named}"
            f"{'; the others are answered' if rows else ''}"
        )


command = cli.command("predict", PredictOptions, run)
