"""Files written whole or not at all: a temporary file beside the target is renamed to it."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitft.version import __version__

LARGEST = 1e9  # largest weight; products of larger ones soon overflow
FORMAT = 1  # version of the file format; raised when an older vitft would misread a file


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file at `path` by `content`.

    After a crash the file holds either all of `content` or what it held before.

    Raises:
        OSError: the folder cannot be made or written to, the disk is full, or at `path` is a
            device or a pipe.
    """
    path = Path(path)
    temporary = unfinished(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is no file, and the new one would take its place")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def cannot_write(path: Path, error: OSError) -> OSError:
    """Return an error that says which path cannot be written, why, and what to do."""
    return OSError(
        f"cannot write {path}: {error.strerror or error}; choose a folder you can write to"
    )


def unfinished(path: Path) -> Path:
    """Return a hidden temporary path beside `path`, to write to before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Args:
        folder: where to look.
        name: remove only those that were to become this file; by default all.
    """
    target = ".+" if name is None else re.escape(name)
    for path in folder.glob(".*"):
        if not re.fullmatch(rf"\.+{target}(\.[0-9a-f]{{32}})+", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, is nested too deep, or is a folder, a pipe or a device.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise ValueError("it is a folder, a pipe or a device")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the JSON.
        finite: return None for each NaN and infinity.

    Raises:
        ValueError: it is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=(lambda _: None) if finite else None)
    except RecursionError:
        raise ValueError("values are nested too deep") from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors, whole or not at all, with `metadata` as JSON in its header.

    The header has a single entry, `vitft`, because safetensors writes several in random order, and
    the same model must give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"format": FORMAT, "version": __version__, **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, {"vitft": json.dumps(metadata)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata that `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole safetensors file, a newer vitft wrote it, or its metadata
            is no JSON.
    """
    return _read(path, tensors=True)


def check_weight(name: str, tensor: Tensor) -> None:
    """Check that a tensor's values are plausible weights.

    Raises:
        ValueError: a value is not finite, or larger than LARGEST.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"tensor {name} has values that are not finite")
    if (largest := tensor.abs().amax()) > LARGEST:
        raise ValueError(f"tensor {name} has a value of {largest:.0e}; it is damaged")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a file, without reading its tensors.

    Raises:
        FileNotFoundError, ValueError: as for `read_tensors`.
    """
    return _read(path, tensors=False)[1]


def _metadata(path: Path, text: str) -> dict[str, Any]:
    """Return a file's metadata without the format and version, which are checked.

    Raises:
        ValueError: it is no JSON dictionary, or a newer vitft wrote it.
    """
    try:
        metadata = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path} was not written by vitft: its metadata is no JSON ({error})"
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} was not written by vitft: its metadata is no dictionary")
    number, version = metadata.pop("format", FORMAT), metadata.pop("version", "")
    if not isinstance(number, int) or number > FORMAT:
        newer = f"'vitft>={version}'" if isinstance(version, str) and version else "-U vitft"
        raise ValueError(
            f"{path} was written by a newer vitft, in format {str(number)[:20]}; this one knows "
            f"up to {FORMAT}: pip install {newer}"
        )
    return metadata


def _read(path: str | Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, if they are wanted, and the metadata; raises as `read_tensors`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(path, (file.metadata() or {}).get("vitft", "{}"))
            names = file.keys() if tensors else ()  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, RuntimeError) as error:  # RuntimeError if the file changes meanwhile
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); download or save it again"
        ) from error
