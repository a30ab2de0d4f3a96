"""JSON values of a file in; a record with values of the declared types, or a named error, out."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
MAX_DEPTH, MAX_VALUES = 20, 1_000_000


def record_of(kind: type[T], value: Any, where: str, *, finite: bool = True) -> T:
    """Return a parsed JSON value as an instance of `kind`.

    Args:
        kind: a dataclass, or a type such as dict[str, int].
        value: the parsed JSON.
        where: the place of the value, such as a file's name, for error messages.
        finite: whether every number must be finite.

    Raises:
        ValueError: a field is missing, unknown, of another type, out of its range or not finite, or
            there are more than MAX_VALUES values or MAX_DEPTH levels.
    """
    _check(value, where, finite=finite)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := [str(name) for name in value if name not in known]:
            raise ValueError(f"{where}: {unknown[0][:80]!r} is unknown")
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{where}: {_plain(str(error))}") from error


def part_of(kind: type[T], value: Any, where: str) -> T:
    """Return the fields of a dataclass that a JSON dictionary holds; others are left out.

    Args:
        kind: the dataclass.
        value, where: as for `record_of`.

    Raises:
        ValueError: as for `record_of`, or it is no dictionary.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no dictionary")
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return record_of(kind, {name: value[name] for name in names if name in value}, where)


def _check(value: Any, where: str, *, finite: bool) -> None:
    """Check the depth, the number of values, and whether numbers are finite, level by level."""
    level, n = [value], 0
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, (list, dict))
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        n += len(level)
        if finite and any(isinstance(part, float) and not math.isfinite(part) for part in level):
            raise ValueError(f"{where}: a number is not finite")
        if not level:
            return
        if n > MAX_VALUES:
            raise ValueError(f"{where}: more than {MAX_VALUES:,} values")
    raise ValueError(f"{where}: values are nested more than {MAX_DEPTH} deep")


def _plain(text: str) -> str:
    """Return msgspec's "Expected `int`, got `str` - at `$.dim`" as "dim: Expected int, got str"."""
    what, _, path = text.partition(" - at ")
    name = path.strip("`").removeprefix("$.")
    return (f"{name.replace('$', '')}: " if name else "") + what.replace("`", "")
