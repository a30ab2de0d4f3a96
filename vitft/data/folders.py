"""A folder of images in; its image files with classes and splits out."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vitft.data.listing import Listing
from vitft.data.tables import list_table
from vitft.pictures.decode import has_heif, is_image

# name of a folder, in small letters -> the split that it holds
NAMES = {"train": "train", "test": "test"}
NAMES |= dict.fromkeys(("val", "valid", "validation"), "validation")


def list_folder(folder: Path) -> Listing:
    """Return the images of a folder.

    It holds `train` with `val`, `valid` or `validation` and/or `test` beside it, each with CLASS/*
    images; or CLASS/* alone, which nobody has split. A metadata.csv, as Hugging Face's imagefolder
    has it, takes the place of class folders.

    Raises:
        ValueError: it or a class to train on holds no images, or a split stands there twice.
    """
    if (table := folder / "metadata.csv").is_file():
        return list_table(table)
    inside = _folders(folder)
    parts = [path for path in inside if path.name.lower() in NAMES]
    splits = [NAMES[path.name.lower()] for path in parts]
    if not parts or ("train" not in splits and len(parts) < len(inside)):
        return _list_classes(folder, inside, "")
    if twice := [part for part, count in Counter(splits).items() if count > 1]:
        names = " and ".join(p.name for p in parts if NAMES[p.name.lower()] == twice[0])
        raise ValueError(f"{folder} holds {names}, which are one split; join them")
    listing = Listing()
    for path, part in zip(parts, splits, strict=True):
        table = path / "metadata.csv"
        listing.join(
            list_table(table, part)
            if table.is_file()
            else _list_classes(path, _folders(path), part)
        )
    if others := [path.name for path in inside if path not in parts]:
        listing.notes.append(f"skipped, since they are no split: {', '.join(others[:10])}")
    return listing


def _list_classes(folder: Path, classes: list[Path], part: str) -> Listing:
    listing = Listing()
    for path in classes:
        found = find_images(path, listing.skipped)
        if not found and part in ("", "train"):
            raise ValueError(f"{path} holds no images; remove the folder or put images into it")
        listing.add(found, path.name, part)
    loose = sum(is_image(path) for path in _files(folder))
    if loose:
        listing.skipped["in no class's folder"] += loose
    if not listing.paths:
        raise ValueError(
            f"{folder} holds no images; put them into {folder}/CLASS/, a folder for each class"
        )
    return listing


def find_images(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """Return the image files in and below a folder, sorted, none that is hidden.

    A name's suffix tells an image, or where it doesn't, the file's content. Linked folders are
    followed once.

    Args:
        folder: to look in.
        skipped: counts what is no image, by suffix.
    """
    found = []
    for path in _walk(folder, set()):
        if is_image(path):
            found.append(path)
        elif skipped is not None:
            skipped[_kind(path)] += 1
    return sorted(found)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".heic", ".heif") and not has_heif():
        return f"{suffix} (which pillow-heif reads: pip install pillow-heif)"
    return suffix or "without a suffix"


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files in and below a folder, none that is hidden; every folder once."""
    status = folder.stat()
    if (key := (status.st_dev, status.st_ino)) in seen:
        return
    seen.add(key)
    yield from _files(folder)
    for path in _folders(folder):
        yield from _walk(path, seen)


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_file()]


def _inside(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith("."))
