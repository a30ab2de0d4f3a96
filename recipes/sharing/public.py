"""The text of a run's files in; the same text without paths of this machine out."""

import html
import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from vitft.data.named import is_named_set
from vitft.hub import is_name
from vitft.model.checkpoint import BUNDLED

PICTURE = re.compile(r"(data:[\w/+.-]+;base64,[A-Za-z0-9+/=]*)")  # has slashes that are no paths
OF_PEFT = "base_model_name_or_path"  # a path, or the name OWNER/NAME of a model on the hub
PATH_KEYS = ("data", "base", "out", "from_", OF_PEFT)


def data_name(data: str) -> str:
    """Return the name of a data set: of a named set its name, else the last part of its path."""
    return data if is_named_set(data) else Path(data).resolve().name


def is_bundled(base: str) -> bool:
    """Return whether this is the name of a base that ships with vitft."""
    return "/" not in base and (BUNDLED / f"{base}.safetensors").is_file()


def is_public(base: str) -> bool:
    """Return whether others can load a base by this name."""
    return is_name(base) or is_bundled(base)


def base_name(summary: Mapping[str, Any]) -> str | None:
    """Return a name of a run's base without a path of this machine.

    That is the name by which others can load it, else the last part of its path. It is None where
    the run had no base, or its summary.json does not name it.
    """
    base, source = summary.get("base"), summary.get("base_source")
    if not isinstance(base, str):
        return None
    if is_public(base):
        return base
    if isinstance(source, str) and is_name(source):
        return source
    path = Path(base).resolve()
    return path.parent.name if path.name == "model.safetensors" else path.name


def private_paths(folder: Path, *contents: Mapping[str, Any]) -> list[str]:
    """Return the paths that must not be published, the longest first.

    Args:
        folder: of the run.
        contents: of its JSON files.
    """
    known = []
    for key, content in product(PATH_KEYS, contents):
        path = str(content.get(key, ""))
        if is_name(path) or not ("/" in path or "\\" in path):
            continue
        if key != OF_PEFT or Path(path).is_absolute() or Path(path).exists():
            known.append(path)
    whole = [str(Path(path).resolve()) for path in [*known, str(folder)]]
    found = {*known, *whole, str(Path.home())} - {"/"}
    return sorted(found, key=len, reverse=True)


def cleaned(text: str, paths: list[str]) -> str:
    """Return the text with each of the paths replaced by its last part, the home folder by ~."""
    parts = PICTURE.split(text)
    for path in paths:
        short = "~" if path == str(Path.home()) else Path(path).name
        pattern, short = _pattern(path), short.replace("\\", r"\\")
        parts[::2] = [pattern.sub(short, part) for part in parts[::2]]
    return "".join(parts)


def holds(text: str, path: str) -> bool:
    """Return whether a text contains a path."""
    return _pattern(path).search(text) is not None


def _pattern(path: str) -> re.Pattern[str]:
    """Return a pattern that finds a path, also as it is escaped in HTML and JSON."""
    forms = {path, html.escape(path), json.dumps(path)[1:-1]}
    return re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, forms))})(?![\w-])")
