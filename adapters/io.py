"""An adapted model in, a folder in PEFT's layout out; and back, strictly.

`adapter_config.json` tells the method; `adapter_model.safetensors` holds the tensors of the adapter
and of the modules that trained with it. What PEFT has no place for is JSON in one metadata entry,
`adapters` (safetensors writes several in random order): `base_fingerprint`, and `classes` where
`model.classes` is a tuple of names.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.inject import (
    Injection,
    adapter_layer,
    base_fingerprint,
    eject,
    inject,
    injection,
    set_classes,
)
from adapters.methods import METHODS
from adapters.targets import matching, peft_targets

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
CHOOSING = ("target_modules", "exclude_modules", "layers_pattern")  # beside LAYERS, by names
LAYERS = "layers_to_transform"  # by numbers
LINEAR = "LINEAR"  # peft_type where only modules_to_save trained; PEFT has no such method

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class AdapterFolder:
    """What stands in an adapter's folder."""

    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor] = field(repr=False)  # by PEFT's names
    fingerprint: str | None  # of the base; None where PEFT wrote the folder
    classes: tuple[str, ...] | None  # what the logits stand for

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both files to `folder`, each whole or not at all.

        Raises:
            OSError: the folder can't be written.
        """
        ours: dict[str, Any] = {}
        if self.fingerprint is not None:
            ours["base_fingerprint"] = self.fingerprint
        if self.classes is not None:
            ours["classes"] = self.classes
        metadata = {"adapters": json.dumps(ours, sort_keys=True)}
        tensors = {key: t.detach().contiguous().cpu() for key, t in self.tensors.items()}
        _write(Path(folder, TENSORS), save(tensors, metadata))
        # not sort_keys: of several patterns that match, the first counts
        text = json.dumps(dict(sorted(self.config.items())), indent=2) + "\n"
        _write(Path(folder, CONFIG), text.encode())


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter and the trained modules to `folder`, each file whole or not at all.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
        OSError: the folder can't be written.
    """
    record = injection(model)
    written = record.config.to_peft() if record.config else {"peft_type": LINEAR}
    written |= {"modules_to_save": [*record.trained] or None, "task_type": None}
    classes = getattr(model, "classes", None)
    AdapterFolder(
        config=written,
        tensors=_tensors(model, record, save=True),
        fingerprint=base_fingerprint(model),
        classes=classes if isinstance(classes, tuple) else None,
    ).save(folder)


def load_adapter(
    model: Model, folder: str | os.PathLike[str] | AdapterFolder, *, train: bool = False
) -> Model:
    """Adapt the base `model` in place as `folder` says, and return it.

    Trained modules, the head above all, come with the adapter: an `nn.Linear` gets as many outputs
    as the file has. `model.classes` becomes the adapter's, where the file names any.

    Args:
        model: the base, in the dtype and on the device to compute in.
        folder: written by `save_adapter`, or by PEFT; or what `combine` gave.
        train: False returns the model frozen and in eval mode; True as `inject` would, to train on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, an option is unknown or not supported, a tensor is missing,
            unexpected, of another shape or not finite, or the adapter belongs to another base.
            The model is then what it was.
    """
    saved = folder if isinstance(folder, AdapterFolder) else read_adapter(folder)
    where = Path() if isinstance(folder, AdapterFolder) else Path(folder)
    try:
        inject(model, _config(model, saved.config), saved.config.get("modules_to_save") or ())
    except ValueError as error:
        raise ValueError(f"{where / CONFIG}: {error}") from error
    try:
        _fill(model, saved)
    except Exception as error:
        eject(model)
        raise ValueError(f"{where / TENSORS}: {error}") from error
    if saved.classes is not None:
        set_classes(model, saved.classes)
    return model if train else model.requires_grad_(False).eval()


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Return what stands in `folder`, without a model to judge it by.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken.
    """
    for name in (CONFIG, TENSORS):
        if not Path(folder, name).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {name} is missing")
    try:
        config = json.loads(Path(folder, CONFIG).read_bytes())
        _check_names(config)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{Path(folder, CONFIG)} is broken: {error}") from error
    try:
        with safe_open(Path(folder, TENSORS), framework="pt") as file:
            ours = json.loads((file.metadata() or {}).get("adapters", "{}"))
            classes = tuple(ours["classes"]) if "classes" in ours else None
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            return AdapterFolder(config, tensors, ours.get("base_fingerprint"), classes)
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{Path(folder, TENSORS)} is broken: {error}") from error


def _check_names(config: Mapping[str, Any]) -> None:
    """Check that what an adapter_config.json says of modules are names, and numbers of layers.

    Raises:
        ValueError: it is something else.
    """
    for key in ("modules_to_save", *CHOOSING):
        names = config.get(key)
        if not isinstance(names, (list, str, NoneType)) or any(
            not isinstance(name, str) for name in names or ()
        ):
            raise ValueError(f"{key} is {names!r}, not a list of names")
    layers = config.get(LAYERS)
    numbers = layers if isinstance(layers, list) else [layers or 0]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{LAYERS} is {layers!r}, not a list of numbers")


def _config(model: nn.Module, written: Mapping[str, Any]) -> AdapterConfig | None:
    """Return the config that `written` tells, its targets as PEFT finds them in `model`."""
    kind = written.get("peft_type")
    if kind == LINEAR:
        return None
    method = next((method for method in METHODS.values() if method.reads(written)), None)
    if method is None:
        raise ValueError(f"peft_type={kind!r} is none that is known: {', '.join(METHODS)}")
    trained = matching(model, written.get("modules_to_save") or (), "modules_to_save")
    targets = [name for name in peft_targets(model, written) if name not in trained]  # as in PEFT
    return method.from_peft(by_names(written, targets))


def by_names(written: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Return an adapter_config.json's entries with these targets for all that chose them."""
    others = {key: value for key, value in written.items() if key not in (*CHOOSING, LAYERS)}
    return others | {"target_modules": targets}


def _fill(model: nn.Module, saved: AdapterFolder) -> None:
    """Copy the saved tensors into the adapted model."""
    record = injection(model)
    if saved.fingerprint is not None and saved.fingerprint != base_fingerprint(model):
        raise ValueError(
            f"trained on the base {saved.fingerprint}, but this one is {record.fingerprint}; "
            "load that base, and cast it to another dtype only afterwards"
        )
    for name in record.trained:
        _resize(model, name, saved.tensors.get(f"{PREFIX}{name}.weight"))
    places = _tensors(model, record)
    for key in sorted(places.keys() | saved.tensors.keys()):
        if key not in saved.tensors:
            raise ValueError(f"tensor {key} is missing")
        if key not in places:
            raise ValueError(f"tensor {key} is unexpected")
        value, place = saved.tensors[key], places[key]
        if value.shape != place.shape:
            raise ValueError(f"tensor {key} has shape {[*value.shape]}, not {[*place.shape]}")
        if value.is_floating_point() != place.is_floating_point():
            raise ValueError(f"tensor {key} is of {value.dtype}, not {place.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"tensor {key} has values that are not finite")
        place.copy_(value)


def _resize(model: nn.Module, name: str, weight: Tensor | None) -> None:
    """Give a trained `nn.Linear` as many outputs as the saved `weight` (O, I) has."""
    head = model.get_submodule(name)
    if type(head) is nn.Linear and weight is not None and weight.shape[1:] == (head.in_features,):
        head.out_features = len(weight)
        head.weight = nn.Parameter(head.weight.new_empty(weight.shape))
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.new_empty(len(weight)))


def _tensors(model: nn.Module, record: Injection, *, save: bool = False) -> dict[str, Tensor]:
    """Return what a file holds, by PEFT's names, as views of the model's own tensors.

    To save, a layer may give others instead, see `AdapterLayer.exported`.
    """
    found: dict[str, Tensor] = {}
    for name in record.adapted:
        layer = adapter_layer(model, name)
        own = layer.exported() if save else layer.state_dict()
        names = record.config.peft_tensors if record.config else {}
        found |= {f"{PREFIX}{name}.{names[key]}": own[key] for key in own.keys() & names.keys()}
        for key, theirs in record.config.shared().items() if record.config else ():
            found[f"base_model.{theirs}"] = layer.get_buffer(key)
    for name in record.trained:
        state = model.get_submodule(name).state_dict()
        found |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in state.items()}
    return found


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
