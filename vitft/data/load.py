"""`--data` in; a data set with its splits and class names out."""

from dataclasses import replace
from pathlib import Path

from vitft.data.folders import list_folder
from vitft.data.listing import ImageSet, Listing
from vitft.data.named import is_named_set, load_named
from vitft.data.tables import SUFFIXES, list_table
from vitft.pictures.preprocess import Fit


def load_data(
    data: str,
    fit: Fit = Fit(32),  # noqa: B008 (frozen)
    *,
    test_fraction: float | None = None,
    source_pattern: str | None = None,
    learn: bool = True,
) -> ImageSet:
    """Return the set that `data` names.

    Args:
        data: the name of a torchvision set (see `DATASETS`) or of one that the program draws, a
            folder (see `list_folder`) or a table (see `list_table`).
        fit: makes a square of a picture. The set's own also has the range of 16-bit pictures.
        test_fraction: share of each class to hold out where there is no test split; see
            `Listing.image_set`.
        source_pattern: regular expression for the source of a file; see `sources_of`.
        learn: whether a model is to be trained on the set; if not, the range of `fit` is kept.

    Raises:
        ValueError: the name is unknown, the folder or table lacks something, or an option does not
            apply to it.
        OSError: a named set is not on this machine and could not be downloaded.
    """
    path = Path(data)
    if not is_files(data):
        for name, value in (("test-fraction", test_fraction), ("source-pattern", source_pattern)):
            if value is not None:
                raise ValueError(f"--{name} is for folders and tables; {data} is neither")
        return load_named(data, fit)
    listing = list_data(data)
    name = path.resolve().name if path.is_dir() else path.stem
    found = listing.image_set(
        name, fit, test_fraction=test_fraction, source_pattern=source_pattern, learn=learn
    )
    if not is_named_set(str(path)):  # Path drops a leading ./
        return found
    return replace(
        found, notes=(f"{path} is taken as the folder here, not the set of that name", *found.notes)
    )


def list_data(data: str) -> Listing:
    """Return the image files of a folder or table.

    Raises:
        ValueError: it is neither, or lacks something that it needs.
    """
    if not is_files(data):
        raise ValueError(f"{data} is neither a folder nor a CSV, TSV or Parquet file")
    return list_folder(Path(data)) if Path(data).is_dir() else list_table(Path(data))


def unambiguous(data: str) -> str:
    """Return `data`, with ./ in front where it is a folder that has the name of a known set.

    A folder that is named by dots alone gets its whole path: its name is then known elsewhere, too.
    """
    if is_named_set(data):
        return f"./{data}" if is_files(data) else data
    return data if Path(data).name not in ("", "..") else str(Path(data).resolve())


def is_files(data: str) -> bool:
    """Return whether `data` is a folder or table, not a name."""
    path = Path(data)
    return path.is_dir() or (path.suffix.lower() in SUFFIXES and path.is_file())
