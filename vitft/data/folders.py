"""A folder of images in; their classes, paths and sources out."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vitft.data.images import Images
from vitft.data.preprocess import read_image

SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg"}
SUFFIXES |= {".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class FileImages:
    """Image files; called with i it reads file i."""

    paths: list[Path]
    fit: Callable[[Image.Image], Tensor]

    def __call__(self, i: int) -> Tensor:
        """Return image i, uint8 (C, height, width)."""
        return read_image(self.paths[i], self.fit)


def load_folder(
    folder: Path, fit: Callable[[Image.Image], Tensor]
) -> tuple[tuple[str, ...], Images]:
    """Return the classes of a folder with CLASS/* images, and the images.

    Raises:
        ValueError: it or one of its classes holds no images.
    """
    classes = sorted(
        path.name for path in folder.glob("*") if path.is_dir() and path.name[0] != "."
    )
    paths: list[Path] = []
    labels: list[int] = []
    sources: list[str] = []
    for label, name in enumerate(classes):
        found = find_images(Path(folder, name))
        if not found:
            raise ValueError(
                f"{folder / name} holds no images; remove the folder or put images into it"
            )
        paths += found
        labels += [label] * len(found)
        sources += believed([source_of(path) for path in found], found)
    if not paths:
        raise ValueError(
            f"{folder} holds no images; put them into {folder}/CLASS/, a folder for each class"
        )
    return tuple(classes), Images(FileImages(paths, fit), torch.tensor(labels), sources)


def find_images(folder: Path) -> list[Path]:
    """Return the image files in and below a folder, sorted, none that is hidden."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def source_of(path: Path) -> str:
    """Return what an image was cut from: TRACK for a file called TRACK_FRAME, else the file.

    A date and a time, as in a phone's IMG_20240131_093000, are no track of that day.
    """
    track = re.fullmatch(r"(.*\d)_\d+", path.stem)
    if track is None or re.search(r"(^|\D)\d{8}_\d{6,9}$", path.stem):
        return f"{path.parent}/{path.stem}"
    return f"{path.parent}/{track[1]}"


def believed(sources: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Return the sources of one class's files, or the files where the sources make no sense.

    They make no sense where one has nearly all files, as where names begin with the class's.
    """
    most = max(Counter(sources).values(), default=0)
    return [*sources] if most <= 0.75 * len(paths) else [str(path) for path in paths]
