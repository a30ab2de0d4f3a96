"""A model in, the same model adapted out; and the ways back: switch off, eject, merge.

`inject` freezes every parameter, puts an adapter layer in the place of every target, and a copy to
train in the place of every module named in `trainable`. What it replaced is kept aside, so `eject`
puts back the same objects.
"""

import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.layers import AdapterLayer
from adapters.targets import ends, in_layers, matching, refuse

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Injection:
    """What `inject` did to a model; kept in the model, so that it is copied and pickled with it."""

    config: AdapterConfig | None
    adapted: dict[str, nn.Module]  # name of an adapter layer -> the base's module
    trained: dict[str, nn.Module]  # name of a copy that trains -> the base's module
    required_grad: frozenset[str]  # names of the parameters that trained before
    fingerprint: str  # of the base, without `trained`
    classes: Any  # the base's, None where it has none
    disabled: bool = False  # inside `with disabled(model)`


def inject(model: Model, config: AdapterConfig | None, trainable: Collection[str] = ()) -> Model:
    """Adapt `model` in place and return it; only adapters and copies of `trainable` modules train.

    Args:
        model: holds the base's weights; calls its modules rather than reading their weights.
        config: the method and its targets; None adapts nothing, so that only `trainable` trains.
        trainable: exact names of modules or dotted suffixes, as in `config.targets`.

    Raises:
        ValueError: the model is adapted already, a name matches no module, or a module can't be
            adapted or copied. The model is then what it was.
    """
    if "_injection" in vars(model):
        raise ValueError("the model is adapted already; eject or merge it before another inject")
    trained = matching(model, trainable, "trainable")
    adapted = matching(model, config.targets, "target") if config else {}
    if config:
        config, adapted = _by_names(model, config, adapted)
    if not adapted and not trained:
        raise ValueError("nothing would train; give a config, or names of modules in trainable")
    refuse(model, adapted, trained)
    layers = config.adapt_all(adapted) if config else {}
    copies = {name: copy.deepcopy(base).requires_grad_(True) for name, base in trained.items()}
    record = Injection(
        config=config,
        adapted=adapted,
        trained=trained,
        required_grad=frozenset(n for n, p in model.named_parameters() if p.requires_grad),
        fingerprint=fingerprint(model, exclude=tuple(trained)),
        classes=getattr(model, "classes", None),
    )
    model.requires_grad_(False)
    _replace(model, {**layers, **copies})
    vars(model)["_injection"] = record
    return model


def _by_names(
    model: nn.Module, config: AdapterConfig, found: dict[str, nn.Module]
) -> tuple[AdapterConfig, dict[str, nn.Module]]:
    """Return the config and its modules, layers and patterns put as names, which PEFT has too."""
    if config.layers:
        own = config.targets == getattr(
            type(config), "targets", None
        )  # of a default, not all need be there
        found = in_layers(found, config.layers, () if own else config.targets)
    elif all(any(ends(name, wanted) for wanted in config.targets) for name in found):
        return config, found
    config = replace(config, targets=tuple(found), layers=())
    if more := sorted(matching(model, config.targets, "target").keys() - found.keys()):
        raise ValueError(f"{more[0]!r} ends in the name of a target; choose targets by full names")
    return config, found


def injection(model: nn.Module) -> Injection:
    """Return what `inject` noted of an adapted model.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = vars(model).get("_injection")
    if not isinstance(record, Injection):
        raise ValueError("the model has no adapters; inject or load them first")
    if record.disabled:
        raise ValueError("the adapters are switched off; leave `with disabled(model)` first")
    return record


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let `model` compute the base's function: what it computed just before `inject`, bit for bit.

    Adapters are switched off, and the base's own modules stand in for the trained ones, with the
    base's `classes`. May be nested.

    Raises:
        ValueError: the model is not adapted.
    """
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


def eject(model: Model) -> Model:
    """Put back the base that `inject` found, the same modules bit for bit, and return the model.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = injection(model)
    for name, base in record.adapted.items():
        layer = model.get_submodule(name)
        for key in base._parameters:  # new objects after sharding or load_state_dict(assign=True)
            setattr(base, key, getattr(layer, key))
    _replace(model, record.adapted | record.trained)
    set_classes(model, record.classes)
    return _release(model)


def merge(model: Model) -> Model:
    """Bake the adapters into modules of the base's classes, for good, and return the model.

    Trained modules stay, as trained. The model has the base's keys only and computes what it did.

    Raises:
        ValueError: the model is not adapted, its adapters are switched off, the method can't be
            merged, or a merged value is not finite. The model is then what it was.
    """
    merged = {name: adapter_layer(model, name).merged() for name in injection(model).adapted}
    for name, module in merged.items():
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise ValueError(f"merging {name!r} gives values that are not finite; eject it instead")
    _replace(model, merged)
    return _release(model)


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Return 16 hexadecimal digits that tell the base's tensors, as float32, from any others.

    Adapters change nothing in it, and trained modules are left out: what it is before `inject` with
    `exclude=trainable`, it is after `inject`, on any device, and after training.

    Raises:
        ValueError: a name in `exclude` matches no module.
    """
    trained, added = set(matching(model, exclude, "exclude")), set()
    record = vars(model).get("_injection")
    if isinstance(record, Injection):
        trained |= record.trained.keys()
        for name, base in record.adapted.items():
            own = model.get_submodule(name).state_dict().keys() - base.state_dict().keys()
            added |= {f"{name}.{key}" for key in own}
    left_out = tuple(f"{name}." for name in trained)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if key not in added and not key.startswith(left_out) and isinstance(tensor, Tensor):
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def shared_copy(model: Model) -> Model:
    """Return a copy of `model` whose tensors lie in the same memory.

    What is frozen, moved to another device or cast in one of them is not so in the other; a value
    that changes in place changes in both.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def adapter_layer(model: nn.Module, name: str) -> AdapterLayer:
    """Return the adapter layer called `name`."""
    return cast(AdapterLayer, model.get_submodule(name))


def set_classes(model: nn.Module, classes: Any) -> None:
    """Set `model.classes`, the names of what its logits stand for, where they differ."""
    if getattr(model, "classes", None) is not classes:
        object.__setattr__(model, "classes", classes)


def _switch(
    model: nn.Module, record: Injection, modules: Mapping[str, nn.Module], classes: Any, *, on: bool
) -> None:
    for name in record.adapted:
        adapter_layer(model, name).enabled = on
    _replace(model, modules)
    set_classes(model, classes)
    record.disabled = not on


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put every module in its place, in the mode, dtype and on the device of what stood there."""
    for name, new in modules.items():
        old = model.get_submodule(name)
        tensors = dict(chain(old.named_parameters(), old.named_buffers()))
        for key, tensor in chain(new.named_parameters(), new.named_buffers()):
            if key in tensors:
                tensor.data = tensor.data.to(tensors[key])
        model.set_submodule(name, new.train(old.training))


def _release(model: Model) -> Model:
    """Let the parameters train that did before `inject`, and forget it."""
    record = vars(model).pop("_injection")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.required_grad)
    return model
