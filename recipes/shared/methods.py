"""A method's name and the options that users gave in; the adapter's config out.

The options come from the configs themselves, so that a new method needs no line here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

import adapters
from vitft.command.options import option

BASELINES = {"linear": "only the new head", "full": "everything"}
# near the best for the base that ships and for a ViT-S/14, see docs/adapters.md and backbones.md;
# the others' on a known backbone are a tenth
LR = {"lora": 3e-3, "dora": 3e-3, "loha": 1e-2, "lokr": 1e-2, "full": 1e-3}
LR_OTHERS = 3e-2
LR_KNOWN = {"lora": 1e-3, "dora": 1e-3, "full": 3e-5}
_LISTED = ", ".join(f"{name} {lr:g}" for name, lr in LR.items())
LR_DEFAULT = (
    f"[default: {_LISTED}, others {LR_OTHERS:g}; on a known backbone "
    f"{', '.join(f'{name} {lr:g}' for name, lr in LR_KNOWN.items())}, others a tenth]"
)


def names() -> list[str]:
    """Return the names of all methods and baselines."""
    return [*adapters.METHODS, *BASELINES]


def default_lr(name: str, *, known_backbone: bool) -> float:
    """Return the default of the highest learning rate of a method or baseline.

    Large pretrained ViTs of other libraries need lower rates than the base that ships.
    """
    lr = LR.get(name, LR_OTHERS)
    return LR_KNOWN.get(name, lr / 10) if known_backbone else lr


@cache
def method_options() -> dict[str, tuple[Any, Any]]:
    """Return the options that the methods add: by name its type, and its field for `option`."""
    texts: dict[str, dict[str, list[str]]] = {}  # name -> help -> the methods that it is for
    types: dict[str, Any] = {}
    for method, config in adapters.METHODS.items():
        hints = get_type_hints(config)
        for field in fields(config):
            if "help" not in field.metadata:  # those that every method has
                continue
            default = field.default if field.default not in (MISSING, (), "") else "none"
            default = ",".join(default) if isinstance(default, tuple) else default
            text = f"{field.metadata['help']} [default: {default}]"
            texts.setdefault(field.name, {}).setdefault(text, []).append(method)
            types[field.name] = hints[field.name]
    return {
        name: (
            types[name] | None,
            option(
                None,
                "  ".join(f"{', '.join(methods)}: {text}" for text, methods in by_help.items()),
            ),
        )
        for name, by_help in texts.items()
    }


def method_lines() -> list[str]:
    """Return a line for every method: its name, and the first line of its documentation."""
    summaries = {name: inspect.getdoc(config) or "" for name, config in adapters.METHODS.items()}
    return [
        f"  {name:<12}{text.splitlines()[0].rstrip('.')}"
        for name, text in (summaries | BASELINES).items()
    ]


def make_config(name: str, values: Mapping[str, Any]) -> adapters.AdapterConfig | None:
    """Return the config of a method, None for a baseline.

    Args:
        name: of the method or baseline.
        values: by option what the user gave, None where nothing was.

    Raises:
        ValueError: an unknown method, a value out of its range, or an option that the method
            does not have.
    """
    if name not in (known := names()):
        raise ValueError(f"unknown adapter {name!r}; choose from {', '.join(known)}")
    method = adapters.METHODS.get(name)
    has = {field.name for field in fields(method)} if method else set()
    given = {key: value for key, value in values.items() if value is not None}
    if unknown := sorted(given.keys() - has):
        flag = unknown[0].replace("_", "-")
        raise ValueError(f"--{flag} means nothing to --adapter {name}; leave it out")
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"])
    return method(**given) if method else None


def parse_layers(layers: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers that parts such as "0" and "4-5" name.

    Raises:
        ValueError: there is no part, or one is neither a number nor a range.
    """
    if not layers:
        raise ValueError("--layers is empty; leave it out to adapt all")
    numbers: list[int] = []
    for part in layers:
        low, _, high = part.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)):
            raise ValueError(f"layers={part} is not a number or a range, such as 0 or 4-5")
        numbers += range(int(low), int(high or low) + 1)
    return tuple(numbers)
