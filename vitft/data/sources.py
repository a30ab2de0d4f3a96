"""Files in; the source of each picture, such as a video or a patient, out."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path


def sources_of(
    paths: Sequence[Path], alike: Sequence[Hashable], pattern: str | None = None
) -> list[str]:
    """Return the source of each file, or the file itself where its name tells no plausible source.

    Args:
        paths: the files.
        alike: for each file, its class and split; names are compared within these.
        pattern: a regular expression whose first group, found in a path, is the source; by default
            the source is that of `source_of`.

    Raises:
        ValueError: the pattern is no regular expression with a group.
    """
    if pattern is not None:
        compiled = _compiled(pattern)
        return [_matched(compiled, path) for path in paths]
    found = [source_of(path) for path in paths]
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(alike):
        groups.setdefault(key, []).append(i)
    for group in groups.values():
        plausible = plausible_sources([found[i] for i in group], [paths[i] for i in group])
        for i, source in zip(group, plausible, strict=True):
            found[i] = source
    return found


def source_of(path: Path) -> str:
    """Return the source of an image: TRACK for a file called TRACK_FRAME, else the file itself.

    Both names begin with the folder. A phone's IMG_20240131_093000 ends in a date and a time, not
    in a track and a frame.
    """
    track = re.fullmatch(r"(.*\d)_\d+", path.stem)
    if track is None or re.search(r"(^|\D)\d{8}_\d{6,9}$", path.stem):
        return f"{path.parent}/{path.stem}"
    return f"{path.parent}/{track[1]}"


def plausible_sources(sources: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Return the sources of one class's files, or the files themselves if those are implausible.

    A source with more than three quarters of a class's files is implausible: it is rather the name
    of the class, with which its files begin.
    """
    most = max(Counter(sources).values(), default=0)
    return [*sources] if most <= 0.75 * len(paths) else [str(path) for path in paths]


def _compiled(pattern: str) -> "re.Pattern[str]":
    """Return the compiled pattern.

    Raises:
        ValueError: it is no regular expression with a group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"source_pattern={pattern!r} is no regular expression: {error}") from error
    if not compiled.groups:
        raise ValueError(
            f"source_pattern={pattern!r} has no group; put brackets around the source's name, "
            "as in '(patient[0-9]+)_'"
        )
    return compiled


def _matched(pattern: "re.Pattern[str]", path: Path) -> str:
    """Return the first group that the pattern finds in a path, or the path where it finds none."""
    found = pattern.search(path.as_posix())
    return str(path) if found is None or found[1] is None else found[1]
