"""The record of what `inject` did to a model, kept in the model, and the means to undo it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar, cast

from torch import nn

from adapters.config import AdapterConfig
from adapters.layers import AdapterLayer
from adapters.targets import WRAPPERS

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
    modes: dict[str, bool] | None = None  # before `load_adapter`, where it set eval mode
    fingerprint: str | None = None  # of the base without `trained`, once computed
    # adapter layers not called so far whose parent may read their weight instead
    doubtful: set[str] = field(default_factory=set)


def injection(model: nn.Module) -> Injection:
    """Return the record of an adapted model.

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
    """Return the model without the wrappers of torch.compile, DDP or DataParallel."""
    while "_injection" not in vars(model):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if type(model).__name__ not in WRAPPERS or inner is None:
            break
        model = inner
    return model


def adapter_layer(model: nn.Module, name: str) -> AdapterLayer:
    """Return the adapter layer called `name`."""
    return cast(AdapterLayer, unwrapped(model).get_submodule(name))


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


def set_classes(model: nn.Module, classes: Any) -> None:
    """Set `model.classes`, the class names of its logits, unless they are set already."""
    if getattr(model, "classes", None) is not classes:
        object.__setattr__(model, "classes", classes)


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules by name; the new ones take modes, dtypes and devices of those replaced."""
    for name, new in modules.items():
        old = model.get_submodule(name)
        tensors = dict(chain(old.named_parameters(), old.named_buffers()))
        for key, tensor in chain(new.named_parameters(), new.named_buffers()):
            if key in tensors:
                tensor.data = tensor.data.to(tensors[key])
        modes = {key: module.training for key, module in old.named_modules()}
        for key, module in new.named_modules():
            module.training = modes.get(key, old.training)
        model.set_submodule(name, new)


def release(model: Model) -> Model:
    """Restore each parameter's requires_grad from before `inject`, and remove the record."""
    record = vars(model).pop("_injection")
    for name, parameter in every_parameter(model):
        parameter.requires_grad_(name in record.required_grad)
    return model


def every_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has."""
    return model.named_parameters(remove_duplicate=False)
