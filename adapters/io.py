"""An adapted model in, a folder in PEFT's layout out; and the way back, strictly checked."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.folder import CONFIG, PREFIX, TENSORS, AdapterFolder, read_adapter
from adapters.identity import base_fingerprint, whole
from adapters.inject import inject
from adapters.peft import LINEAR, method_name, read_config
from adapters.record import (
    Injection,
    adapter_layer,
    injection,
    refuse_doubtful,
    set_classes,
    unwrapped,
)
from adapters.restore import eject
from adapters.targets import named_modules, only
from adapters.translate import translated

Model = TypeVar("Model", bound=nn.Module)
LARGEST = 1e9  # magnitude of a weight; with larger ones, activations soon overflow


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter and the trained modules to `folder`, each file whole or not at all.

    Where several processes train together, all must call this, and the first one writes.

    Args:
        model: adapted.
        folder: to write to; made if it does not exist.

    Raises:
        ValueError: the model is not adapted, its adapters are switched off, a layer may never be
            called, or a tensor is not finite.
        OSError: the folder can't be written.
    """
    record, inner = injection(model), unwrapped(model)
    refuse_doubtful(record)
    config = record.config
    written = config.to_peft() if config else {"peft_type": LINEAR}
    written |= {"modules_to_save": [*record.trained] or None, "task_type": None}
    classes = getattr(inner, "classes", None)
    tensors = _tensors(inner, record, save=True) | _untrained(inner, record)
    saved = AdapterFolder(
        config=written,
        # in one order, since all processes gather each tensor together
        tensors={key: whole(tensors[key].detach()) for key in sorted(tensors)},
        fingerprint=base_fingerprint(model),
        classes=classes if isinstance(classes, tuple) else None,
        method=method_name(config) if config else None,
        options=config.kept_options() if config else {},
        preprocessing=getattr(inner, "preprocessing", None),
        trained=tuple(record.trained),
    )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        saved.save(folder)


def load_adapter(
    model: Model,
    folder: str | os.PathLike[str] | AdapterFolder,
    *,
    train: bool = False,
    methods: Mapping[str, type[AdapterConfig]] | None = None,
    fingerprint: str | None = None,
) -> Model:
    """Adapt the base `model` in place as `folder` says, and return it.

    Trained modules, such as the head, are loaded too: an `nn.Linear` gets as many outputs as the
    file has. `model.classes` becomes the adapter's, where the file names any.

    Args:
        model: the base, in the dtype and on the device to compute in.
        folder: written by `save_adapter` or by PEFT; or what `combine` returned.
        train: False returns the model frozen and in eval mode; True as `inject` would, to train on.
        methods: config classes by name, of methods that are not in METHODS.
        fingerprint: of the base without the modules that trained, where it is known.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, an option is unknown or not supported, a tensor is missing,
            unexpected, of another shape or not finite, or the adapter belongs to another base.
            The model is then unchanged.
    """
    saved = folder if isinstance(folder, AdapterFolder) else read_adapter(folder)
    where = Path() if isinstance(folder, AdapterFolder) else Path(folder)
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        saved = translated(saved, model)
        config, trained = read_config(model, saved, methods)
        inject(
            model,
            config,
            [only(name) for name in trained],
            to_train=train,
            skip_trained=True,
            fingerprint=fingerprint,
        )
    except ValueError as error:
        raise ValueError(f"{where / CONFIG}: {error}") from error
    try:
        _fill(model, saved)
        if saved.preprocessing is not None and hasattr(model, "preprocessing"):
            object.__setattr__(model, "preprocessing", saved.preprocessing)
    except Exception as error:
        eject(model)
        raise ValueError(f"{where / TENSORS}: {error}") from error
    if saved.classes is not None:
        set_classes(model, saved.classes)
    if train:
        return model
    injection(model).modes = modes
    return model.requires_grad_(False).eval()


def _fill(model: nn.Module, saved: AdapterFolder) -> None:
    """Copy the saved tensors into the adapted model.

    Raises:
        ValueError: a tensor does not fit, or the adapter belongs to another base.
    """
    record = injection(model)
    for name in record.trained:
        _resize(model, name, saved.tensors.get(f"{PREFIX}{name}.weight"))
    expected = _tensors(model, record)
    others = _untrained(model, record)
    for key in sorted(expected.keys() | saved.tensors.keys()):
        if key not in saved.tensors:
            raise ValueError(f"tensor {key} is missing")
        if key not in expected:
            if key in others:
                continue
            raise ValueError(f"tensor {key} is unexpected")
        value, target = saved.tensors[key], expected[key]
        if value.shape != target.shape:
            raise ValueError(f"tensor {key} has shape {[*value.shape]}, not {[*target.shape]}")
        if value.is_floating_point() != target.is_floating_point():
            raise ValueError(f"tensor {key} is of {value.dtype}, not {target.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"tensor {key} has values that are not finite")
        if value.numel() and (largest := value.abs().amax()) > LARGEST:
            raise ValueError(f"tensor {key} has a value of {float(largest):.0e}; it is damaged")
        target.copy_(value)
    if saved.fingerprint is not None and saved.fingerprint != base_fingerprint(model):
        raise ValueError(
            f"trained on the base {saved.fingerprint}, but this one is {record.fingerprint}; "
            "load that base, and cast it to another dtype only afterwards"
        )


def _resize(model: nn.Module, name: str, weight: Tensor | None) -> None:
    """Give a trained `nn.Linear` as many outputs as the saved `weight` (O, I) has."""
    head = model.get_submodule(name)
    if type(head) is nn.Linear and weight is not None and weight.shape[1:] == (head.in_features,):
        head.out_features = len(weight)
        head.weight = nn.Parameter(head.weight.new_empty(weight.shape))
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.new_empty(len(weight)))


def _tensors(model: nn.Module, record: Injection, *, save: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a file by PEFT's names; they share the model's memory.

    With `save` they are those that `AdapterLayer.exported` returns.
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
        found |= _state(model, name)
    return found


def _untrained(model: nn.Module, record: Injection) -> dict[str, Tensor]:
    """Return the tensors of base modules whose names end in a trained module's name.

    PEFT takes such modules for trained ones, "q_norm" where "norm" trained; it needs their tensors.
    """
    found: dict[str, Tensor] = {}
    for name in named_modules(model):
        alike = any(name.endswith(t) and name != t for t in record.trained)
        if alike and not any(name.startswith(f"{t}.") for t in (*record.trained, *record.adapted)):
            found |= _state(model, name)
    return found


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    state: dict[str, Any] = model.get_submodule(name).state_dict()
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in state.items()}
