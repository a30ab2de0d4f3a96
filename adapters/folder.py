"""The two files of an adapter's folder, in PEFT's layout: read, and written whole or not at all.

`adapter_config.json` holds the method and its options; `adapter_model.safetensors` holds the
tensors of the adapter and of the modules that trained. What PEFT has no place for is JSON in one
metadata entry, `adapters` (safetensors writes several in random order): `base_fingerprint`;
`classes`, where `model.classes` is a tuple of names; `method`, `options`, `preprocessing` and
`trained`, see `AdapterFolder`; and `config`, what the other file of this save says of the function.
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
READS = 5  # of a folder that is written meanwhile
PREFIX = "base_model.model."
CHOOSING = ("target_modules", "exclude_modules", "layers_pattern")  # beside LAYERS, by names
LAYERS = "layers_to_transform"  # by numbers
# entries of an adapter_config.json that change nothing of what is computed
FREE = frozenset(
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
    """What an adapter_config.json says of modules: their names, and numbers of layers."""

    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    modules_to_save: Names = None
    layers_to_transform: list[int] | int | None = None


@dataclass(frozen=True)
class Metadata:
    """What the metadata entry `adapters` of the tensors tells; see `AdapterFolder`."""

    base_fingerprint: str | None = None
    classes: tuple[str, ...] | None = None
    config: dict[str, Any] | None = None
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] | None = None
    trained: tuple[str, ...] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """What stands in an adapter's folder."""

    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor] = field(repr=False)  # by PEFT's names
    fingerprint: str | None  # of the base; None where PEFT wrote the folder
    classes: tuple[str, ...] | None  # what the logits stand for
    method: str | None = None  # its name, where vitft wrote the folder
    options: Mapping[str, Any] = field(default_factory=dict)  # those that PEFT has no key for
    preprocessing: dict[str, Any] | None = None  # what images need, where the model says so
    trained: tuple[str, ...] | None = None  # modules that trained besides, by their whole names

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both files to `folder`, each whole or not at all.

        Raises:
            ValueError: a tensor is not finite; nothing is written.
            OSError: the folder can't be written.
        """
        tensors = {key: t.detach().contiguous().cpu() for key, t in self.tensors.items()}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} has values that are not finite; nothing was saved")
        ours = {
            "base_fingerprint": self.fingerprint,
            "classes": self.classes,
            "method": self.method,
            "options": dict(self.options) or None,
            "preprocessing": self.preprocessing,
            "trained": self.trained,
            "config": _meaning(self.config),
        }
        ours = {key: value for key, value in ours.items() if value is not None}
        metadata = {"adapters": json.dumps(ours, sort_keys=True)}
        write_bytes(Path(folder, TENSORS), save(tensors, metadata))
        # not sort_keys: of several patterns that match, the first counts
        text = json.dumps(dict(sorted(self.config.items())), indent=2) + "\n"
        write_bytes(Path(folder, CONFIG), text.encode())


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Return what stands in `folder`, without a model to judge it by.

    Where another process saves into the folder meanwhile, it is read again.

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
    """Return what changes when a file of an adapter is replaced."""
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
            ours = _parsed(Metadata, json.loads(text))
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        _check_one_save(config, ours)
        return AdapterFolder(
            config=config,
            tensors=tensors,
            fingerprint=ours.base_fingerprint,
            classes=ours.classes,
            method=ours.method,
            options=ours.options,
            preprocessing=ours.preprocessing,
            trained=ours.trained,
        )
    # torch's RuntimeError: another file took its place in the middle of it
    except (SafetensorError, ValueError, RuntimeError) as error:  # and RecursionError
        raise ValueError(f"{Path(folder, TENSORS)} is broken: {error}") from error


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an adapter_config.json that change what is computed."""
    return {k: v for k, v in config.items() if k not in FREE and v is not None}


def _parsed(kind: type[Record], value: Any) -> Record:
    """Return what JSON says as a record; entries that it does not have are passed over.

    Raises:
        ValueError: an entry is of another type.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:  # "Expected `str | null`, got `int` - at `$.method`"
        what, _, place = str(error).replace("`", "").partition(" - at $.")
        raise ValueError(f"{place}: {what}" if place else what) from error


def _check_one_save(config: Mapping[str, Any], ours: Metadata) -> None:
    """Check that both files are of the same save, not of two, as after a crash.

    Raises:
        ValueError: they differ in an entry that tells the function.
    """
    if ours.config is None:  # PEFT's, or of vitft 0.1
        return
    here, saved = _meaning(config), ours.config
    for key in sorted(here.keys() | saved.keys()):
        if here.get(key) != saved.get(key):
            raise ValueError(
                f"it was saved with {key}={saved.get(key)!r}, but {CONFIG} says "
                f"{here.get(key)!r}; they are of two saves, or edited: save the adapter again"
            )


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`: after a crash it holds all of it, or what it held.

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
