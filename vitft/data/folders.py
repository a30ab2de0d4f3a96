"""A folder of images in; its image files with classes and splits out."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vitft.data.listing import SPLIT_NAMES, Listing
from vitft.data.tables import list_table, names_images
from vitft.pictures.decode import has_heif, is_image

METADATA = "metadata.csv"
READ_ALREADY = "link to a folder that is read already"


def list_folder(folder: Path) -> Listing:
    """Return the images of a folder.

    It holds `train` with `val`, `valid` or `validation` and/or `test` beside it, each with CLASS/*
    images; or CLASS/* alone, without splits. A metadata.csv that names images and their labels, as
    in Hugging Face's imagefolder, replaces the class folders.

    Raises:
        ValueError: the folder or a training class holds no images, two subfolders are the same
            split, or a metadata.csv is wrong (see `list_table`).
    """
    inside = _folders(folder)
    if table := _table(folder, inside):
        return list_table(table)
    split_folders = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    splits = [SPLIT_NAMES[path.name.lower()] for path in split_folders]
    # Without train, a folder called test among others is a class of that name.
    if not split_folders or ("train" not in splits and len(split_folders) < len(inside)):
        return _list_classes(folder, inside, "")
    if twice := [split for split, count in Counter(splits).items() if count > 1]:
        names = " and ".join(
            p.name for p in split_folders if SPLIT_NAMES[p.name.lower()] == twice[0]
        )
        raise ValueError(f"{folder} holds {names}, which are one split; join them")
    listing = Listing(skipped=_loose(folder))
    for path, split in zip(split_folders, splits, strict=True):
        classes = _folders(path)
        table = _table(path, classes)
        listing.join(list_table(table, split) if table else _list_classes(path, classes, split))
    if others := [path.name for path in inside if path not in split_folders]:
        listing.notes.append(f"skipped, since they are no split: {', '.join(others[:10])}")
    return listing


def is_new_class(folder: Path, data: Path) -> bool:
    """Return whether a folder that is not there yet would, once made, be taken for a class.

    Args:
        folder: the folder.
        data: the folder of images.
    """
    made = [path for path in (folder.resolve(), *folder.resolve().parents) if not path.exists()]
    if not made or not data.is_dir() or _table(data, inside := _folders(data.resolve())):
        return False
    splits = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    has_train = any(path.name.lower() == "train" for path in splits)
    return made[-1].parent in (splits if has_train else [*splits, data.resolve()])


def _table(folder: Path, inside: list[Path]) -> Path | None:
    """Return a folder's metadata.csv if it names images, or if no folders inside could be classes.

    Else it holds other facts, of patients or places, and the folders' names are the labels.
    """
    table = folder / METADATA
    return table if table.is_file() and (names_images(table) or not inside) else None


def _list_classes(folder: Path, classes: list[Path], split: str) -> Listing:
    """Return the images of the class folders in `folder`, all of one split."""
    listing = Listing()
    for path in classes:
        if _identity(path) in _above(path):  # a link to a folder that it lies in
            listing.skipped[READ_ALREADY] += 1
            continue
        found = find_images(path, listing.skipped)
        if not found and split in ("", "train"):
            raise ValueError(f"{path} holds no images; remove the folder or put images into it")
        listing.add(found, path.name, split)
    listing.skipped += _loose(folder)
    if not listing.paths:
        raise ValueError(
            f"{folder} holds no images; put them into {folder}/CLASS/, a folder for each class"
        )
    return listing


def _loose(folder: Path) -> Counter[str]:
    """Count the files that lie beside the folders of splits or classes, by kind."""
    kinds = ("in no class's folder" if is_image(path) else _kind(path) for path in _files(folder))
    return Counter(kinds)


def find_images(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """Return the image files in and below a folder, sorted; hidden files and folders are left out.

    A file is an image by its suffix, or else by its content. A folder that several links lead to is
    searched once, and no link to a folder above is followed.

    Args:
        folder: where to search.
        skipped: a counter to which the files that are no images are added, by suffix, and the links
            that are not followed.
    """
    found, skipped = [], Counter() if skipped is None else skipped
    for path in _walk(folder, _above(folder), skipped):
        if is_image(path):
            found.append(path)
        else:
            skipped[_kind(path)] += 1
    return sorted(found)


def _kind(path: Path) -> str:
    if path.name == METADATA:
        return f"{METADATA} without image names and labels"
    suffix = path.suffix.lower()
    if suffix in (".heic", ".heif") and not has_heif():
        return f"{suffix} (which pillow-heif reads: pip install pillow-heif)"
    return suffix or "without a suffix"


def _identity(folder: Path) -> tuple[int, int]:
    """Return device and inode, which a folder has in common with every link to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _above(folder: Path) -> set[tuple[int, int]]:
    """Return the identities of the folders that a folder, or a link to one, lies in."""
    named = folder.resolve() if folder.name == ".." else folder.absolute()
    parent = named.parent.resolve()
    return {_identity(path) for path in (parent, *parent.parents)}


def _walk(folder: Path, seen: set[tuple[int, int]], skipped: Counter[str]) -> Iterator[Path]:
    """Yield the files in and below a folder that are not hidden, visiting every folder once.

    Args:
        folder: where to start.
        seen: identities of the folders that are not to be visited, or were so far.
        skipped: a counter to which the links that are not followed are added.
    """
    if (identity := _identity(folder)) in seen:
        skipped[READ_ALREADY] += 1
        return
    seen.add(identity)
    yield from _files(folder)
    if n := sum(not path.exists() for path in _inside(folder)):
        skipped["link to nothing"] += n
    for path in _folders(folder):
        yield from _walk(path, seen, skipped)


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_file()]


def _inside(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith("."))
