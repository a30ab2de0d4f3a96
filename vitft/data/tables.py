"""A table (CSV, TSV or Parquet) in; the image files that it names, with classes and splits, out."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from vitft.data.listing import SEPARATOR, SPLIT_NAMES, SPLITS, Listing

SUFFIXES = (".csv", ".tsv", ".parquet")
PATH = ("path", "file_name")  # the second is the name in Hugging Face's metadata.csv
LABEL = ("label", "labels")


def list_table(file: Path, split: str = "") -> Listing:
    """Return the images that a table names.

    Its columns are `path` (or `file_name`), relative to the table's folder or absolute; `label`, or
    several labels with "|" between them; and, optionally, `split`: train, val, valid, validation or
    test.

    Args:
        file: the .csv, .tsv or .parquet file.
        split: the split of rows that name none; "" leaves them without a split.

    Raises:
        ValueError: the table cannot be read or has no rows, a column or value is missing, a split
            is unknown, or image files are missing.
    """
    rows = _rows(file)
    path_key, label_key = (_column(file, rows, names) for names in (PATH, LABEL))
    listing = Listing()
    for number, row in enumerate(rows, start=1):
        name, label = row[path_key], row[label_key]
        if not name or not label:
            raise ValueError(f"{file}: row {number} lacks its {label_key if name else path_key}")
        given = row.get("split", "").lower()
        if given and given not in SPLIT_NAMES:
            raise ValueError(
                f"{file}: row {number} is of split {given!r}, not {', '.join(SPLITS)} or val"
            )
        listing.add([file.parent / name], label, SPLIT_NAMES.get(given, split))
        listing.several |= SEPARATOR in label
    if missing := [path for path in listing.paths if not path.is_file()]:
        names = ", ".join(str(path) for path in missing[:10])
        more = ", ..." if len(missing) > 10 else ""
        raise ValueError(f"{file}: {len(missing)} of its files are missing: {names}{more}")
    return listing


def names_images(file: Path) -> bool:
    """Return whether a text table's first line names the columns that `list_table` needs.

    What is no readable table is said to have them, so that `list_table` tells what is wrong with
    it.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            found = _reader(lines).fieldnames
    except (OSError, UnicodeDecodeError, csv.Error):
        return True
    keys = {_key(name) for name in found or ()}
    return not keys or all(keys & {*names} for names in (PATH, LABEL))


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        found = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_text(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no readable table ({error})") from error
    if not found:
        raise ValueError(f"{file} has no rows")
    return [{_key(key): _text(value) for key, value in row.items()} for row in found]


def _key(name: object) -> str:
    return str(name or "").strip().lower()


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _read_text(file: Path) -> Sequence[Mapping[str, object]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(_reader(lines))


def _reader(lines: TextIO) -> "csv.DictReader[str]":
    """Return a reader of the rows of an opened table, whatever separates its columns."""
    head = lines.readline()
    lines.seek(0)
    return csv.DictReader(lines, delimiter=max("\t,;", key=head.count))


def _read_parquet(file: Path) -> Sequence[Mapping[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow; install vitft[parquet]") from error
    try:
        rows: list[dict[str, object]] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    return rows


def _column(file: Path, rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    for name in names:
        if name in rows[0]:
            return name
    raise ValueError(f"{file} has no column {names[0]}; it has {', '.join(rows[0])}")
