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
# Near the best for the bundled base, and LR_KNOWN for a ViT-S/14; see docs/adapters.md and
# docs/backbones.md. On a known backbone the other methods take a tenth.
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
    """Return the default of --lr for a method or baseline.

    Large pretrained ViTs of other libraries need a lower rate than the bundled base.
    """
    lr = LR.get(name, LR_OTHERS)
    return LR_KNOWN.get(name, lr / 10) if known_backbone else lr


@cache
def method_options() -> dict[str, tuple[Any, Any]]:
    """Return the options that the methods add: for each name, its type and its dataclass field."""
    texts: dict[str, dict[str, list[str]]] = {}  # name -> help text -> methods with this text
    types: dict[str, Any] = {}
    for method, config in adapters.METHODS.items():
        hints = get_type_hints(config)
        for field in fields(config):
            if "help" not in field.metadata:  # such as targets, which every method has
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
        name: the method or baseline.
        values: for each option the value that the user gave, or None.

    Raises:
        ValueError: the method is unknown, it has no such option, or a value is out of its range.
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
    """Return the block numbers that --layers gives, such as (0, 4, 5) for ("0", "4-5").

    Raises:
        ValueError: nothing is given, or something that is neither a number nor a range.
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
