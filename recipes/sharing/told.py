"""The folder of a run, or of an adapter that no run has made, in; what its files tell out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.folder import read_adapter
from vitft.files import read_json, read_metadata


@dataclass(frozen=True)
class Told:
    """What a run's folder tells, or an adapter's that no run has made.

    Attributes:
        file: that holds the weights.
        summary, config: what summary.json and config.json hold, {} where there is none.
        adapter: what adapter_config.json holds, {} of a base.
        fingerprint: of the adapter's base, where it is told.
    """

    file: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    classes: tuple[str, ...]
    method: str | None
    fingerprint: str | None = None


def read_told(folder: Path) -> Told:
    """Return what a folder with an adapter or a base tells.

    Raises:
        ValueError, OSError: it holds neither, or a file is broken.
    """
    summary, config = (_json(folder / f"{name}.json") for name in ("summary", "config"))
    base = folder / "model.safetensors"
    if (folder / "adapter_config.json").is_file():
        saved = read_adapter(folder)
        method = saved.method or str(saved.config.get("peft_type", "")).lower()
        return Told(
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
    return Told(base, summary, config, {}, tuple(header["classes"]), summary.get("adapter"))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except TypeError as error:
        raise ValueError(f"{path} is broken ({error})") from error
