"""Files written whole or not at all: a temporary one beside the target, flushed, then renamed."""

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

LARGEST = 1e9  # of a weight: beyond it, what is computed is soon infinite
FORMAT = 1  # of the files; raised when an older vitft would misread them


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file at `path` by `content`.

    After a crash it holds either all of `content` or what it held before.

    Raises:
        OSError: the folder cannot be made or written to, or the disk is full; says which file
            was meant.
    """
    path = Path(path)
    temporary = unfinished(path)
    try:
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


def cannot_write(place: Path, error: OSError) -> OSError:
    """Return the error that says what cannot be written, and what to do."""
    return OSError(
        f"cannot write {place}: {error.strerror or error}; choose a folder you can write to"
    )


def unfinished(path: Path) -> Path:
    """Return another name beside a file or folder, for as long as it is being written."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what whoever wrote it left in a folder under its temporary name when he was killed.

    Args:
        folder: of the files.
        name: of the one that was meant; any by default.
    """
    meant = ".+" if name is None else re.escape(name)
    for path in folder.glob(".*"):
        if not re.fullmatch(rf"\.+{meant}(\.[0-9a-f]{{32}})+", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Return what stands in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or is nested beyond all use.
    """
    try:
        return loaded(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{Path(path).name} is no JSON ({error})") from error


def loaded(text: str | bytes, *, finite: bool = False) -> Any:
    """Return what JSON says.

    Args:
        text: the JSON.
        finite: take numbers that are not finite for None.

    Raises:
        ValueError: it is none, or is nested beyond all use.
    """
    try:
        return json.loads(text, parse_constant=(lambda _: None) if finite else None)
    except RecursionError:
        raise ValueError("values are nested too deep") from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors, whole or not at all, with `metadata` as JSON in one entry.

    The entry is `vitft`. One, because safetensors writes several in random order, and the same
    model is to give the same bytes.
    """
    metadata = {"format": FORMAT, "version": __version__, **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, {"vitft": json.dumps(metadata)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata that `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors, is cut short, or its metadata is no JSON.
    """
    return _read(path, tensors=True)


def check_weight(name: str, tensor: Tensor) -> None:
    """Check that a model can compute with a tensor's numbers.

    Raises:
        ValueError: one is not finite, or beyond what any weight is.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"tensor {name} has values that are not finite")
    if (largest := tensor.abs().amax()) > LARGEST:
        raise ValueError(f"tensor {name} has a value of {largest:.0e}; it is damaged")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata alone, without reading the tensors.

    Raises:
        FileNotFoundError, ValueError: as for `read_tensors`.
    """
    return _read(path, tensors=False)[1]


def _metadata(path: Path, text: str) -> dict[str, Any]:
    """Return a file's metadata, in a format that is known.

    Raises:
        ValueError: it is no JSON, or newer than this vitft.
    """
    try:
        metadata = loaded(text)
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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(path, (file.metadata() or {}).get("vitft", "{}"))
            names = file.keys() if tensors else ()  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, RuntimeError) as error:  # torch's: it was replaced in the middle
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); download or save it again"
        ) from error
