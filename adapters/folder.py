"""The two files of an adapter's folder, in PEFT's layout: read, and written whole or not at all.

`adapter_config.json` holds the method and its options; `adapter_model.safetensors` holds the
tensors of the adapter and of the modules that trained. What PEFT has no keys for is JSON in one
metadata entry, `adapters` (safetensors writes several in random order): `base_fingerprint`;
`classes`, where `model.classes` is a tuple of names; `method`, `options`, `preprocessing` and
`trained`, see `AdapterFolder`; and `config`, the entries of the other file that change what is
computed, by which files of two saves are told apart.
"""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Record = TypeVar("Record")
Names = list[str] | str | None
READS = 5  # how often to read a folder that another process is writing
PREFIX = "base_model.model."
# entries of an adapter_config.json that together choose the modules to adapt
TARGET_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
# entries of an adapter_config.json that don't change what is computed
WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)


@dataclass(frozen=True)
class Chosen:
    """The entries of an adapter_config.json that choose modules, by names and numbers of layers."""

    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    modules_to_save: Names = None
    layers_to_transform: list[int] | int | None = None


@dataclass(frozen=True)
class Metadata:
    """The metadata entry `adapters` of the tensors' file; see `AdapterFolder`."""

    base_fingerprint: str | None = None
    classes: tuple[str, ...] | None = None
    config: dict[str, Any] | None = None
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] | None = None
    trained: tuple[str, ...] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """The content of an adapter's folder."""

    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor] = field(repr=False)  # by PEFT's names
    fingerprint: str | None  # of the base; None where PEFT wrote the folder
    classes: tuple[str, ...] | None  # names of the logits' classes
    method: str | None = None  # name in METHODS, where vitft wrote the folder
    options: Mapping[str, Any] = field(default_factory=dict)  # those that PEFT has no key for
    preprocessing: dict[str, Any] | None = None  # of images, where the model has it
    trained: tuple[str, ...] | None = None  # whole names of modules that trained too

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both files to `folder`, each whole or not at all.

        Raises:
            ValueError: a tensor is not finite; nothing is written.
            OSError: the folder can't be written.
        """
        tensors = {key: t.detach().contiguous().cpu() for key, t in self.tensors.items()}
        seen: set[int] = set()
        for key, tensor in tensors.items():  # safetensors refuses memory under two names
            if (memory := tensor.untyped_storage().data_ptr()) in seen:
                tensors[key] = tensor.clone()
            seen.add(memory)
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} has values that are not finite; nothing was saved")
        metadata = {
            "base_fingerprint": self.fingerprint,
            "classes": self.classes,
            "method": self.method,
            "options": dict(self.options) or None,
            "preprocessing": self.preprocessing,
            "trained": self.trained,
            "config": _effective(self.config),
        }
        metadata = {key: value for key, value in metadata.items() if value is not None}
        entry = {"adapters": json.dumps(metadata, sort_keys=True)}
        write_bytes(Path(folder, TENSORS), save(tensors, entry))
        # not sort_keys: of several patterns that match, the first counts
        text = json.dumps(dict(sorted(self.config.items())), indent=2) + "\n"
        write_bytes(Path(folder, CONFIG), text.encode())


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Return the content of `folder`, which is not compared with any model.

    If another process saves to the folder meanwhile, it is read again.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken.
    """
    for name in (CONFIG, TENSORS):
        if not Path(folder, name).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {name} is missing")
    for _ in range(READS - 1):
        before = _versions(folder)
        try:
            return _read(folder)
        except ValueError:
            if _versions(folder) == before:
                raise
    return _read(folder)


def _versions(folder: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Return inode and modification time of both files, which differ once one is replaced."""
    found = [Path(folder, name).stat() for name in (CONFIG, TENSORS)]
    return [(one.st_ino, one.st_mtime_ns) for one in found]


def _read(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Read both files of an adapter once.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or they are of two saves.
    """
    try:
        config = json.loads(Path(folder, CONFIG).read_bytes())
        _parsed(Chosen, config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{Path(folder, CONFIG)} is broken: {error}") from error
    try:
        with safe_open(Path(folder, TENSORS), framework="pt") as file:
            text = (file.metadata() or {}).get("adapters", "{}")
            metadata = _parsed(Metadata, json.loads(text))
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        _check_one_save(config, metadata)
        return AdapterFolder(
            config=config,
            tensors=tensors,
            fingerprint=metadata.base_fingerprint,
            classes=metadata.classes,
            method=metadata.method,
            options=metadata.options,
            preprocessing=metadata.preprocessing,
            trained=metadata.trained,
        )
    # RuntimeError: torch's, if the file is replaced while it is read, and RecursionError
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{Path(folder, TENSORS)} is broken: {error}") from error


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an adapter_config.json that change what is computed."""
    return {k: v for k, v in config.items() if k not in WITHOUT_EFFECT and v is not None}


def _parsed(kind: type[Record], value: Any) -> Record:
    """Return JSON as a record; entries that the record does not have are ignored.

    Raises:
        ValueError: an entry is of another type.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:  # "Expected `str | null`, got `int` - at `$.method`"
        what, _, place = str(error).replace("`", "").partition(" - at $.")
        raise ValueError(f"{place}: {what}" if place else what) from error


def _check_one_save(config: Mapping[str, Any], metadata: Metadata) -> None:
    """Check that both files are of one save; after a crash between the two they may not be.

    Raises:
        ValueError: they differ in an entry that changes what is computed.
    """
    if metadata.config is None:  # PEFT's, or of vitft 0.1
        return
    here, saved = _effective(config), metadata.config
    for key in sorted(here.keys() | saved.keys()):
        if here.get(key) != saved.get(key):
            raise ValueError(
                f"it was saved with {key}={saved.get(key)!r}, but {CONFIG} says "
                f"{here.get(key)!r}; they are of two saves, or edited: save the adapter again"
            )


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`; after a crash it holds all of the new or the old.

    Raises:
        OSError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
