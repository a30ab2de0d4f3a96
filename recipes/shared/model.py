"""What `--base` and `--adapter` say in; a model ready for evaluation out."""

import json
from dataclasses import dataclass
from pathlib import Path

import adapters
from adapters.folder import read_adapter
from vitft.command.options import option
from vitft.model.checkpoint import load_model
from vitft.model.vit import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of every command that uses a model."""

    base: str | None = option(
        None,
        "A .safetensors file, a run's folder, another library's folder or file, or the name of a "
        "bundled base.  [default: the base that the adapter's run was started with]",
    )


def open_model(base: str | None, adapter: str | None) -> VisionTransformer:
    """Return the base, adapted where an adapter is given, ready for evaluation.

    Raises:
        ValueError, OSError: a file is missing, broken, or the adapter is another base's.
    """
    model = load_model(find_base_of(base, adapter))
    if adapter is None:
        return model
    adapters.load_adapter(model, adapter)
    n_classes, saved = model.head.out_features, read_adapter(adapter)
    if saved.classes is None and "head" in (saved.config.get("modules_to_save") or ()):
        model.classes = tuple(str(i) for i in range(n_classes))  # PEFT saves no names
    if len(model.classes) != n_classes:
        raise ValueError(
            f"{adapter} names {len(model.classes)} classes, but its head has {n_classes}"
        )
    return model


def find_base_of(base: str | None, adapter: str | Path | None) -> str:
    """Return the base's name: the one given, or the one that the adapter's run was started with.

    Raises:
        ValueError: none is given, and no adapter's folder tells it.
    """
    if base is not None:
        return base
    if adapter is None:
        raise ValueError("there is no base; name one by --base")
    try:
        told = json.loads(Path(adapter, "config.json").read_text())["base"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{adapter} does not tell which base it was trained on; name it by --base"
        ) from error
    return str(told)
