"""A model in, the same model adapted out.

`inject` freezes every parameter, replaces every target by an adapter layer, and every module named
in `trainable` by a copy that trains. It records what it replaced, so that `adapters.restore` can
put back the same objects.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.identity import computed
from adapters.record import Injection, every_parameter, replace_modules
from adapters.targets import (
    EITHER,
    ends,
    in_layers,
    matching,
    named_modules,
    refuse,
    refuse_statistics,
    select,
    use_of,
)

Model = TypeVar("Model", bound=nn.Module)


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
        model: the base, with its weights; it must call its modules, not read their weights.
        config: the method and its targets; None adapts nothing, so that only `trainable` trains.
        trainable: exact names of modules or dotted suffixes, as in `config.targets`.
        to_train: False for a model that will only predict: a frozen batch norm is then no error.
        skip_trained: leave out targets inside `trainable` modules, as PEFT does; otherwise they are
            an error.
        fingerprint: of the base without `trainable`, where it is known; otherwise it is computed
            from all weights when it is first needed.

    Raises:
        ValueError: the model is adapted already, a name matches no module, or a module can't be
            adapted or copied. The model is then what it was.
    """
    if "_injection" in vars(model):
        raise ValueError("the model is adapted already; eject or merge it before another inject")
    trained = matching(model, trainable, "trainable")
    wanted = config.targets if config and not _is_default(config) else ()
    config = _present(model, config) if config else None
    adapted = matching(model, config.targets, "target") if config else {}
    if config:
        inside = trained if skip_trained else ()
        adapted = _outside(adapted, inside)
        config, adapted = _by_names(model, config, adapted, wanted, inside)
    if not adapted and not trained:
        raise ValueError("nothing would train; give a config, or names of modules in trainable")
    refuse(model, adapted, trained)
    if to_train:
        refuse_statistics(model, trained)
    layers = config.adapt_all(adapted) if config else {}
    copies = {name: _copy_to_train(base, name) for name, base in trained.items()}
    record = Injection(
        config=config,
        adapted=adapted,
        trained=trained,
        required_grad=frozenset(n for n, p in every_parameter(model) if p.requires_grad),
        fingerprint=fingerprint,
        classes=getattr(model, "classes", None),
        preprocessing=getattr(model, "preprocessing", None),
        doubtful={name for name in adapted if use_of(model, name) == EITHER},
    )
    model.requires_grad_(False)
    replace_modules(model, {**layers, **copies})
    vars(model)["_injection"] = record
    for name in record.doubtful:
        layers[name].register_forward_pre_hook(_FirstCall(record, name))
    return model


def _copy_to_train(base: nn.Module, name: str) -> nn.Module:
    """Return a copy of a module, all of which trains.

    Raises:
        ValueError: it can't be copied, can't train, or has a state that a file can't hold.
    """
    if any(not isinstance(value, Tensor) for value in base.state_dict().values()):
        raise ValueError(f"{name!r} has a state that is no tensor, which no adapter's file holds")
    if any(isinstance(vars(part).get("forward"), FunctionType) for part in base.modules()):
        raise ValueError(f"{name!r} has a forward of its own, which a copy that trains would share")
    try:
        return copy.deepcopy(base, computed(base)).requires_grad_(True)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name!r} has no copy that trains: {reason}") from error


@dataclass(eq=False)
class _FirstCall:
    """A hook, copied and pickled with its model, that notes when a doubtful layer is called."""

    record: Injection
    name: str

    def __call__(self, layer: nn.Module, inputs: Any) -> None:
        self.record.doubtful.discard(self.name)
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]


def _is_default(config: AdapterConfig) -> bool:
    return config.targets == getattr(type(config), "targets", None)


def _present(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """Return the config; of default targets it keeps those that the model has."""
    if not _is_default(config):
        return config
    modules = named_modules(model)
    hits = {wanted: select(modules, wanted) for wanted in config.targets}
    found = [
        w for w, names in hits.items() if names and all(config.suits(modules[n]) for n in names)
    ]
    return replace(config, targets=tuple(found or config.targets))


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
    wanted: Collection[str],
    trained: Collection[str],
) -> tuple[AdapterConfig, dict[str, nn.Module]]:
    """Return the config with names in place of `layers` and regular expressions, and its modules.

    PEFT reads names in the same way, so that a saved config means the same there.

    Args:
        model: to adapt.
        config: with targets that the model has.
        found: the modules that its targets match.
        wanted: targets that must have a module in the chosen layers.
        trained: names of modules inside which targets are left out.

    Raises:
        ValueError: the chosen layers lack a target, or a module's whole name ends another's too.
    """
    if config.layers:
        found = in_layers(found, config.layers, wanted)
    elif all(any(ends(name, wanted) for wanted in config.targets) for name in found):
        return config, found
    config = replace(config, targets=tuple(found), layers=())
    again = _outside(matching(model, config.targets, "target"), trained)
    if more := sorted(again.keys() - found.keys()):
        raise ValueError(f"{more[0]!r} ends in the name of a target; choose targets by full names")
    return config, found
