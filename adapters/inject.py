"""A model in, the same model adapted out; and the ways back: switch off, eject, merge.

`inject` freezes every parameter, puts an adapter layer in the place of every target, and a copy to
train in the place of every module named in `trainable`. What it replaced is kept aside, so `eject`
puts back the same objects.
"""

import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.layers import AdapterLayer
from adapters.targets import (
    EITHER,
    WRAPPERS,
    ends,
    in_layers,
    matching,
    refuse,
    refuse_statistics,
    use_of,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Injection:
    """What `inject` did to a model; kept in the model, so that it is copied and pickled with it."""

    config: AdapterConfig | None
    adapted: dict[str, nn.Module]  # name of an adapter layer -> the base's module
    trained: dict[str, nn.Module]  # name of a copy that trains -> the base's module
    required_grad: frozenset[str]  # names of the parameters that trained before
    classes: Any  # the base's, None where it has none
    preprocessing: Any = None  # the base's, None where it has none
    disabled: bool = False  # inside `with disabled(model)`
    modes: dict[str, bool] | None = None  # of the base's modules, where loading changed them
    fingerprint: str | None = None  # of the base without `trained`, once it was asked for
    doubtful: set[str] = field(default_factory=set)  # layers that nothing has called so far


def inject(
    model: Model,
    config: AdapterConfig | None,
    trainable: Collection[str] = (),
    *,
    to_train: bool = True,
    skip_trained: bool = False,
    fingerprint: str | None = None,
) -> Model:
    """Adapt `model` in place and return it; only adapters and copies of `trainable` modules train.

    Args:
        model: holds the base's weights; calls its modules rather than reading their weights.
        config: the method and its targets; None adapts nothing, so that only `trainable` trains.
        trainable: exact names of modules or dotted suffixes, as in `config.targets`.
        to_train: False for a model that will only predict: a frozen batch norm is then no error.
        skip_trained: leave out targets inside `trainable` modules, as PEFT does; else they are
            refused.
        fingerprint: of the base without `trainable`, where it is known; to compute it reads every
            weight, and happens when it is first needed.

    Raises:
        ValueError: the model is adapted already, a name matches no module, or a module can't be
            adapted or copied. The model is then what it was.
    """
    if "_injection" in vars(model):
        raise ValueError("the model is adapted already; eject or merge it before another inject")
    trained = matching(model, trainable, "trainable")
    adapted = matching(model, config.targets, "target") if config else {}
    if config:
        inside = trained if skip_trained else ()
        adapted = _outside(adapted, inside)
        config, adapted = _by_names(model, config, adapted, inside)
    if not adapted and not trained:
        raise ValueError("nothing would train; give a config, or names of modules in trainable")
    refuse(model, adapted, trained)
    if to_train:
        refuse_statistics(model, trained)
    layers = config.adapt_all(adapted) if config else {}
    copies = {name: copy.deepcopy(base).requires_grad_(True) for name, base in trained.items()}
    record = Injection(
        config=config,
        adapted=adapted,
        trained=trained,
        required_grad=frozenset(n for n, p in _parameters(model) if p.requires_grad),
        fingerprint=fingerprint,
        classes=getattr(model, "classes", None),
        preprocessing=getattr(model, "preprocessing", None),
        doubtful={name for name in adapted if use_of(model, name) == EITHER},
    )
    model.requires_grad_(False)
    _replace(model, {**layers, **copies})
    vars(model)["_injection"] = record
    for name in record.doubtful:
        _note_first_call(record, name, layers[name])
    return model


def _note_first_call(record: Injection, name: str, layer: nn.Module) -> None:
    """Let a layer, of which it is not sure whether anything calls it, say so when it is called."""

    def called(*_: Any) -> None:
        record.doubtful.discard(name)
        handle.remove()

    handle = layer.register_forward_pre_hook(called)


def refuse_doubtful(record: Injection) -> None:
    """Check that every adapter layer was called, where its parent may read its weight instead.

    Raises:
        ValueError: one was not.
    """
    if record.doubtful:
        name = min(record.doubtful)
        raise ValueError(
            f"{name!r} was never called, and its parent may read its weight directly; "
            "adapters.check(model, inputs) tells, or leave it out of targets"
        )


def _outside(found: dict[str, nn.Module], trained: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that lie outside the trained ones."""
    return {
        name: module
        for name, module in found.items()
        if not any(name.startswith(f"{outer}.") for outer in trained)
    }


def _by_names(
    model: nn.Module,
    config: AdapterConfig,
    found: dict[str, nn.Module],
    trained: Collection[str],
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
    again = _outside(matching(model, config.targets, "target"), trained)
    if more := sorted(again.keys() - found.keys()):
        raise ValueError(f"{more[0]!r} ends in the name of a target; choose targets by full names")
    return config, found


def injection(model: nn.Module) -> Injection:
    """Return what `inject` noted of an adapted model.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = vars(unwrapped(model)).get("_injection")
    if not isinstance(record, Injection):
        raise ValueError("the model has no adapters; inject or load them first")
    if record.disabled:
        raise ValueError("the adapters are switched off; leave `with disabled(model)` first")
    return record


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's, DDP's or DataParallel's wrapper, or the model."""
    while "_injection" not in vars(model):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if type(model).__name__ not in WRAPPERS or inner is None:
            break
        model = inner
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let `model` compute the base's function: what it computed just before `inject`, bit for bit.

    Adapters are switched off, and the base's own modules stand in for the trained ones, with the
    base's `classes`. May be nested.

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


def eject(model: Model) -> Model:
    """Put back the base that `inject` found, the same modules bit for bit, and return the model.

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
    _replace(inner, record.adapted | record.trained)
    set_classes(inner, record.classes)
    if record.preprocessing is not None:
        object.__setattr__(inner, "preprocessing", record.preprocessing)
    _release(inner)
    for name, mode in (record.modes or {}).items():
        inner.get_submodule(name).training = mode
    return model


def merge(model: Model) -> Model:
    """Bake the adapters into modules of the base's classes, for good, and return the model.

    Trained modules stay, as trained. The model has the base's keys only and computes what it did.

    Raises:
        ValueError: the model is not adapted, its adapters are switched off, a method can't be
            merged, a layer may never be called, or a merged value is not finite. The model is then
            what it was.
    """
    record, inner = injection(model), unwrapped(model)
    refuse_doubtful(record)
    merged = dict(_merged(inner, record))
    _replace(inner, merged)
    _release(inner)
    return model


def mergeable(model: nn.Module) -> bool:
    """Return whether `merge` would succeed; no more than one layer is merged at a time.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    try:
        for _ in _merged(unwrapped(model), injection(model)):
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
    """Return the layer, or a copy with whole tensors where FSDP2 shards them."""
    if not any(hasattr(tensor, "full_tensor") for tensor in layer.parameters()):
        return layer
    memo: dict[int, Any] = {id(p): nn.Parameter(whole(p.detach())) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from all processes where FSDP2 shards it."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Return 16 hexadecimal digits that tell the base's tensors, as float32, from any others.

    Adapters change nothing in it, and trained modules are left out: what it is before `inject` with
    `exclude=trainable`, it is after `inject`, on any device, and after training.

    Raises:
        ValueError: a name in `exclude` matches no module.
    """
    model = unwrapped(model)
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
            tensor = whole(tensor)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of an adapted model's base, computed once.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = injection(model)
    if record.fingerprint is None:
        record.fingerprint = fingerprint(model)
    return record.fingerprint


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
    return cast(AdapterLayer, unwrapped(model).get_submodule(name))


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
    for name, parameter in _parameters(model):
        parameter.requires_grad_(name in record.required_grad)
    return model


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has."""
    return model.named_parameters(remove_duplicate=False)
