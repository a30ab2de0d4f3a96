"""An adapter_config.json and a model in; the config and the names of trained modules out."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from adapters.config import AdapterConfig
from adapters.folder import PREFIX, TARGET_KEYS, AdapterFolder
from adapters.methods import METHODS
from adapters.patterns import matcher
from adapters.targets import ends, named_modules, select

LINEAR = "LINEAR"  # our peft_type where only modules_to_save trained
ENTRY_POINTS = "vitft.adapters"  # the group under which installed packages offer methods

Methods = Mapping[str, type[AdapterConfig]]


def read_config(
    model: nn.Module, saved: AdapterFolder, methods: Methods | None = None
) -> tuple[AdapterConfig | None, list[str]]:
    """Return the config of a saved adapter, and the names of the modules that trained.

    Args:
        model: the base to adapt.
        saved: the adapter.
        methods: config classes by name, besides METHODS.

    Returns:
        The config, None where only modules trained; and whole names.

    Raises:
        ValueError: the method or an option is unknown, has a wrong value, does not fit the
            tensors, or names nothing in the model.
    """
    written = saved.config
    trained = trained_modules(model, saved)
    if written.get("peft_type") == LINEAR:
        return None, trained
    method = find_method(saved, methods or {})
    targets = peft_targets(model, written, trained)
    if method.by_whole_names and saved.method is None:
        whole = by_names(written, targets)
        targets = [name for name in named_modules(model) if _matches(name, whole["target_modules"])]
    try:
        config = method.from_peft(by_names(written, targets))
        if unknown := saved.options.keys() - {field.name for field in fields(config)}:
            raise ValueError(f"{method.__name__} has no option {min(unknown)!r}")
        config = replace(config, **saved.options)
    except (TypeError, OverflowError, RuntimeError, AttributeError) as error:
        raise ValueError(f"an option has a value of the wrong type: {error}") from error
    _check_sizes(model, config, trained, saved)
    return config, trained


def find_method(saved: AdapterFolder, methods: Methods) -> type[AdapterConfig]:
    """Return the method of a saved adapter: by its name in the file, else by PEFT's marks.

    A name is looked up in `methods`, in METHODS, and among the entry points "vitft.adapters" of
    installed packages. Nothing that a file names is imported.

    Raises:
        ValueError: the method is not known here, or does not fit PEFT's marks.
    """
    known = {**METHODS, **methods}
    if saved.method is not None and saved.method not in known:
        found = entry_points(group=ENTRY_POINTS, name=saved.method)
        known |= {point.name: point.load() for point in found}
        if not found:
            raise ValueError(
                f"trained by the method {saved.method!r}, which is not known here; give "
                f"methods={{{saved.method!r}: its config class}}, or add it to adapters.METHODS"
            )
    fitting = [name for name, method in known.items() if method.reads(saved.config)]
    if not fitting:
        kind = saved.config.get("peft_type")
        raise ValueError(f"peft_type={kind!r} is none that is known: {', '.join(known)}")
    if saved.method not in (None, *fitting):
        raise ValueError(
            f"the file is of the method {saved.method!r}, the config of {fitting[0]!r}"
        )
    return known[saved.method or fitting[0]]


def method_name(config: AdapterConfig) -> str:
    """Return the name under which a config's method is saved: in METHODS, else its class's."""
    names = (name for name, method in METHODS.items() if method is type(config))
    return next(names, type(config).__name__)


def trained_modules(model: nn.Module, saved: AdapterFolder) -> list[str]:
    """Return the names of the modules with tensors in the file that end in `modules_to_save`.

    As in PEFT, an entry need not follow a dot: "norm" matches "q_norm" too.

    Raises:
        ValueError: `modules_to_save` is one string, or an entry matches no such module.
    """
    entries = saved.config.get("modules_to_save") or ()
    if isinstance(entries, str):
        raise ValueError(f"modules_to_save {entries!r} is one string, not a list")
    if saved.trained == tuple(entries):  # as vitft writes them, whole names
        return [*entries]
    found: dict[str, None] = {}
    for entry in entries:
        hits = [name for name in named_modules(model) if name.endswith(entry)]
        hits = [
            name for name in hits if any(k.startswith(f"{PREFIX}{name}.") for k in saved.tensors)
        ]
        if not hits:
            raise ValueError(f"modules_to_save {entry!r} is no module with tensors in the file")
        found |= dict.fromkeys(hits)
    return [name for name in found if not any(_within(name, o) for o in found if o != name)]


def peft_targets(
    model: nn.Module, written: Mapping[str, Any], trained: Collection[str] = ()
) -> list[str]:
    """Return the names of the modules that an adapter_config.json adapts, as in PEFT.

    Where the file's names suffice to choose them, those that match are returned as they are;
    otherwise whole names. Modules inside `trained` ones are left out.

    Raises:
        ValueError: there is none, or a pattern is no regular expression, or one not covered.
    """
    targets, excluded = written.get("target_modules") or (), written.get("exclude_modules")
    numbers = written.get("layers_to_transform")
    numbers = {numbers} if isinstance(numbers, int) else {*(numbers or ())}
    patterns = written.get("layers_pattern") or [r".*\.[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def chosen(name: str) -> bool:
        if isinstance(targets, str) or name in targets or not numbers:
            return True
        # of several patterns, the first that matches a name counts
        found = next((n for one in patterns if (n := _layer(name, one)) is not None), None)
        return found in numbers

    hits = [name for name in named_modules(model) if _matches(name, targets)]
    names = [name for name in hits if chosen(name) and not _matches(name, excluded or ())]
    names = [name for name in names if not any(_within(name, outer) for outer in trained)]
    if not names:
        raise ValueError(f"target_modules {targets!r} is no module of this model")
    if isinstance(targets, str) or names != hits:
        return names
    return [target for target in targets if any(ends(name, target) for name in hits)]


def by_names(written: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Return an adapter_config.json's entries with `targets` in place of all that choose them."""
    others = {key: value for key, value in written.items() if key not in TARGET_KEYS}
    return others | {"target_modules": targets}


def _matches(name: str, wanted: str | Collection[str]) -> bool:
    """Return whether a name matches the expression `wanted`, or ends in one of its names."""
    if isinstance(wanted, str):
        return matcher(wanted)(name)
    return any(ends(name, one) for one in wanted)


def _layer(name: str, pattern: str) -> int | None:
    """Return the first number of a name that follows a match of `pattern`, None if none does."""
    before = matcher(rf"(?:.*\.)?{pattern}")
    numbers = re.finditer(r"\.(\d+)(?=\.)", name)
    return next((int(n[1]) for n in numbers if before(name[: n.start()])), None)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _check_sizes(
    model: nn.Module, config: AdapterConfig, trained: Collection[str], saved: AdapterFolder
) -> None:
    """Check the config's sizes against the file's tensors, before anything is allocated.

    Raises:
        ValueError: a size differs, or its tensor is missing.
    """
    modules = named_modules(model)
    adapted = {name for wanted in config.targets for name in select(modules, wanted)}
    adapted = {name for name in adapted if not any(_within(name, outer) for outer in trained)}
    for option, (suffix, axis) in config.sizes.items():
        for name in sorted(adapted):
            key, size = f"{PREFIX}{name}.{suffix}", config.size(option, name)
            if key not in saved.tensors:
                raise ValueError(f"tensor {key} is missing")
            shape = [*saved.tensors[key].shape]
            if len(shape) <= axis or shape[axis] != size:
                raise ValueError(
                    f"{option} is {size} for {name!r}, but tensor {key} has shape {shape}"
                )
