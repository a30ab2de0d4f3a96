"""The folder of a run, or only of an adapter or base, in; the contents of its files out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.folder import read_adapter
from vitft.files import read_json, read_metadata
from vitft.records import record_of


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's folder, or of a folder with only an adapter or base.

    Attributes:
        file: with the weights.
        summary, config: contents of summary.json and config.json; {} without the file.
        adapter: contents of adapter_config.json; {} for a base.
        classes: class names; () where an adapter has none.
        method: of the adapter; for a base that of the run, None without a run.
        fingerprint: of the adapter's base, where the adapter records it.
    """

    file: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    classes: tuple[str, ...]
    method: str | None
    fingerprint: str | None = None


def read_run_files(folder: Path) -> RunFiles:
    """Return the contents of a folder with an adapter or a base.

    Raises:
        ValueError, OSError: it holds neither, or a file is broken.
    """
    summary, config = (_json(folder / f"{name}.json") for name in ("summary", "config"))
    base = folder / "model.safetensors"
    if (folder / "adapter_config.json").is_file():
        saved = read_adapter(folder)
        method = saved.method or str(saved.config.get("peft_type", "")).lower()
        return RunFiles(
            file=folder / "adapter_model.safetensors",
            summary=summary,
            config=config,
            adapter=saved.config,
            classes=saved.classes or (),
            method=method,
            fingerprint=saved.fingerprint,
        )
    if not base.is_file():
        raise ValueError(
            f"{folder} holds neither an adapter nor a base (adapter_config.json, model.safetensors)"
        )
    header = read_metadata(base)
    if not {"config", "classes", "preprocessing"} <= header.keys():
        raise ValueError(f"{base} is no vitft base; vitft convert makes one of it")
    classes = record_of(tuple[str, ...], header["classes"], f"{base}: classes")
    return RunFiles(base, summary, config, {}, classes, summary.get("adapter"))


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: it is no UTF-8.
        OSError: there is no such file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); save it as UTF-8") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path) if path.is_file() else {}
        return record_of(dict[str, Any], content, path.name, finite=False)
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error})") from error
