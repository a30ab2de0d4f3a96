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

    It names one of DATASETS, one drawn by the program, a folder (see `list_folder`) or a table (see
    `list_table`).

    Args:
        data: the name, folder or table.
        fit: makes a square of a picture. That of the set also knows the range of 16-bit pictures.
        test_fraction: share of each class to hold out where there is no test split; see
            `Listing.image_set`.
        source_pattern: what names the source of a file; see `sources_of`.
        learn: whether a model is to learn from the set; if not, the range of `fit` stands.

    Raises:
        ValueError: unknown name; a folder or table that doesn't hold what it needs; an option that
            does not suit it.
        OSError: a named set is neither there nor could be downloaded.
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
    if not is_named_set(str(path)):  # without ./
        return found
    return replace(
        found, notes=(f"{path} is taken as the folder here, not the set of that name", *found.notes)
    )


def list_data(data: str) -> Listing:
    """Return the image files of a folder or table.

    Raises:
        ValueError: it is neither, or doesn't hold what it needs.
    """
    if not is_files(data):
        raise ValueError(f"{data} is neither a folder nor a CSV, TSV or Parquet file")
    return list_folder(Path(data)) if Path(data).is_dir() else list_table(Path(data))


def unmistakable(data: str) -> str:
    """Return `data`, or ./DATA where that is a folder called as a named set is."""
    return f"./{data}" if is_named_set(data) and is_files(data) else data


def is_files(data: str) -> bool:
    """Return whether `data` is a folder or table, not a name."""
    path = Path(data)
    return path.is_dir() or (path.suffix.lower() in SUFFIXES and path.is_file())
