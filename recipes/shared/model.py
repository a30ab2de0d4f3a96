"""`--base` and `--adapter` in; a model ready for evaluation out."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import adapters
from adapters.folder import read_adapter
from vitft.command.options import option
from vitft.files import read_json
from vitft.hub import fetched
from vitft.model.checkpoint import load_model
from vitft.model.vit import VisionTransformer

BASE = (
    "A .safetensors file, a run's folder, another library's folder or file, or the name of a "
    "bundled base."
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of every command that uses a model."""

    base: str | None = option(
        None, f"{BASE}  [default: the base that the adapter's run was started with]"
    )


def open_model(base: str | None, adapter: str | None) -> VisionTransformer:
    """Return the base, adapted where an adapter is given, ready for evaluation.

    Both may be on the hub: "hf:OWNER/NAME", with "@REVISION" for one version.

    Raises:
        ValueError, OSError: a file is missing or broken, or the adapter belongs to another base.
    """
    folder = None if adapter is None else fetched(adapter)
    model = load_model(find_base_of(base, folder))
    if folder is None:
        return model
    adapters.load_adapter(model, folder)
    n_classes, saved = model.head.out_features, read_adapter(folder)
    if saved.classes is None and "head" in (saved.config.get("modules_to_save") or ()):
        model.classes = tuple(str(i) for i in range(n_classes))  # PEFT saves no names
    if len(model.classes) != n_classes:
        raise ValueError(
            f"{adapter} names {len(model.classes)} classes, but its head has {n_classes}"
        )
    return model


def find_base_of(base: str | None, adapter: str | Path | None) -> str:
    """Return the base's name: the one given, or the one that the adapter's run was started with.

    Args:
        base: the name that the user gave, or None.
        adapter: the adapter's folder on this machine, or None.

    Raises:
        ValueError: no base was given, and no file in the adapter's folder names one.
    """
    if base is not None:
        return base
    if adapter is None:
        raise ValueError("there is no base; name one by --base")
    for name in ("config.json", "summary.json"):  # an adapter from the hub has only the second
        with suppress(OSError, ValueError, TypeError, KeyError):
            return str(read_json(Path(adapter, name))["base"])
    raise ValueError(f"{adapter} does not tell which base it was trained on; name it by --base")
