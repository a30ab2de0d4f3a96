"""An adapted model in; adapters switched off for a while, ejected, or merged into the base."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from adapters.identity import whole
from adapters.layers import AdapterLayer
from adapters.record import (
    Injection,
    adapter_layer,
    injection,
    refuse_doubtful,
    release,
    replace_modules,
    set_classes,
    unwrapped,
)

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let `model` compute what it computed just before `inject`, bit for bit.

    Adapters are switched off, and the base's modules and `classes` replace the trained ones. May be
    nested.

    Raises:
        ValueError: the model is not adapted.
    """
    model = unwrapped(model)
    if getattr(vars(model).get("_injection"), "disabled", False):
        yield
        return
    record = injection(model)
    copies = {name: model.get_submodule(name) for name in record.trained}
    classes = getattr(model, "classes", None)
    try:
        _switch(model, record, record.trained, record.classes, on=False)
        yield
    finally:
        _switch(model, record, copies, classes, on=True)


def _switch(
    model: nn.Module, record: Injection, modules: Mapping[str, nn.Module], classes: Any, *, on: bool
) -> None:
    for name in record.adapted:
        adapter_layer(model, name).enabled = on
    replace_modules(model, modules)
    set_classes(model, classes)
    record.disabled = not on


def eject(model: Model) -> Model:
    """Put back the modules that `inject` replaced, unchanged bit for bit, and return the model.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record, inner = injection(model), unwrapped(model)
    for name, base in record.adapted.items():
        layer = inner.get_submodule(name)
        for key in base._parameters:  # new objects after sharding or load_state_dict(assign=True)
            value = getattr(layer, key)
            is_sharded = hasattr(value, "full_tensor")
            setattr(base, key, nn.Parameter(whole(value.detach())) if is_sharded else value)
    replace_modules(inner, record.adapted | record.trained)
    set_classes(inner, record.classes)
    if record.preprocessing is not None:
        object.__setattr__(inner, "preprocessing", record.preprocessing)
    release(inner)
    for name, mode in (record.modes or {}).items():
        inner.get_submodule(name).training = mode
    return model


def merge(model: Model) -> Model:
    """Bake the adapters into modules of the base's classes, permanently, and return the model.

    Trained modules stay as they are. The model then has the base's keys only and computes the same.

    Raises:
        ValueError: the model is not adapted, its adapters are switched off, a method can't be
            merged, a layer may never be called, or a merged value is not finite. The model is then
            unchanged.
    """
    record, inner = injection(model), unwrapped(model)
    refuse_doubtful(record)
    merged = dict(_merged(inner, record))
    replace_modules(inner, merged)
    release(inner)
    return model


def mergeable(model: nn.Module) -> bool:
    """Return whether every layer can be merged; one is merged at a time, to save memory.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = injection(model)
    try:
        for _ in _merged(unwrapped(model), record):
            pass
    except ValueError:
        return False
    return True


def _merged(model: nn.Module, record: Injection) -> Iterator[tuple[str, nn.Module]]:
    """Yield every adapted module's name, and a module like the base's with the adapter baked in."""
    for name, base in record.adapted.items():
        layer = gathered(adapter_layer(model, name))
        module = layer.merged(base)
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise ValueError(f"merging {name!r} gives values that are not finite; eject it instead")
        yield name, module


def gathered(layer: AdapterLayer) -> AdapterLayer:
    """Return the layer, or a copy with whole tensors where FSDP2 shards them.

    One that can't be merged is returned as it is: it may be a block, and FSDP2's can't be copied.
    """
    if type(layer).merged is AdapterLayer.merged:
        return layer
    if not any(hasattr(tensor, "full_tensor") for tensor in layer.parameters()):
        return layer
    memo: dict[int, Any] = {id(p): nn.Parameter(whole(p.detach())) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
