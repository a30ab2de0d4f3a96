"""A dataclass of options in, a click command out.

Names, defaults and help texts stand once, in the dataclass.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union

import click
from click.core import ParameterSource

from vitft.command.telling import log_start, verbosity

VERBOSITY = (  # options of every command
    click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        help="Print results and errors only: no progress, no notes.",
    ),
    click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        help="Print what helps to find a fault too: versions, options, device, shapes, memory.",
    ),
)
MAX_WHOLE, MAX_FLOAT = 2**62, 1e30  # below what int64 and float32 hold, so products still fit


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    argument: bool = False,
    repeated: bool = False,
) -> Any:
    """Return a dataclass field that is also a command-line option; without a default, required.

    Args:
        default: the value where the option is not given; the user writes a tuple with commas.
        help: its text in `--help`.
        argument: make it a positional argument; a tuple then takes any number of values.
        repeated: let the option be given several times, once for each value of a tuple.
    """
    metadata = {"help": help, "argument": argument, "repeated": repeated}
    return dataclasses.field(default=default, metadata=metadata)


def command(
    name: str,
    options: type[Any],
    run: Callable[[Any], None],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    recall: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> click.Command:
    """Return the command `name`, which makes `options` of what the user gave and calls `run`.

    A value is the one that the user gave, else that of `recall`, else the preset's, else the
    default.

    Args:
        name: the command's name.
        options: a dataclass with fields made by `option`.
        run: what the command does with the options.
        presets: option values by the preset's name; the field `preset` chooses one.
        recall: takes the values that the user gave, and returns those of an earlier run.
    """

    def callback(*, quiet: bool, verbose: bool, **given: Any) -> None:
        with verbosity(quiet=quiet, verbose=verbose):
            values = read(given)
            log_start(name, values)
            run(values)

    def read(given: dict[str, Any]) -> Any:
        source = click.get_current_context().get_parameter_source
        given = {key: v for key, v in given.items() if source(key) is not ParameterSource.DEFAULT}
        for key, value in given.items():
            is_none = value == () == defaults[key]  # else it may say that there are none
            if is_none or (isinstance(value, str) and not value.strip()):
                raise click.UsageError(f"{shown[key]} is empty; give it a value or leave it out")
            if isinstance(value, tuple) and not all(str(part).strip() for part in value):
                raise click.UsageError(f"a part of {shown[key]} is empty; leave it out")
        given = (recall(given) if recall else {}) | given
        if missing := [shown[field.name] for field in needed if field.name not in given]:
            raise click.UsageError(
                f"missing: {', '.join(missing)}; vitft {name} --help tells what to give"
            )
        return resolve(options, given, presets or {})

    types = typing.get_type_hints(options)
    fields = [field for field in dataclasses.fields(options) if field.init]
    needed = [field for field in fields if field.default is dataclasses.MISSING]
    fields.sort(key=lambda field: field not in needed)  # the help begins with what must be given
    defaults = {field.name: field.default for field in fields}
    shown = {  # in messages
        field.name: field.name.upper() if field.metadata["argument"] else flag_of(field)
        for field in fields
    }
    parameters = [_parameter(field, types[field.name]) for field in fields]
    arguments = [
        f"{f.name.upper()}: {f.metadata['help']}" for f in fields if f.metadata["argument"]
    ]
    text = "\n\n".join([inspect.cleandoc(options.__doc__ or ""), *arguments])
    return click.Command(name, callback=callback, params=[*parameters, *VERBOSITY], help=text)


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """Return how an option is written on the command line."""
    return "--" + field.name.rstrip("_").replace("_", "-")


def arguments_of(options: Any) -> list[str]:
    """Return the command-line arguments that give `options`, without those that have defaults."""
    found: list[str] = []
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), flag_of(field)
        if value == field.default or value is None:
            continue
        if isinstance(value, bool):
            found.append(flag if value else f"--no-{flag[2:]}")
            continue
        if isinstance(value, Mapping):
            value = ",".join(f"{name}={number}" for name, number in value.items())
        elif isinstance(value, tuple):
            value = ",".join(f'"{part}"' if "," in part else part for part in value)
        found.append(f"{flag}={value}")
    return found


def resolve(
    options: type[Any], given: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Return `options` from what was given, then the preset's values, then the defaults.

    Raises:
        ValueError: the preset is unknown, or a number is too large to compute with.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    values: dict[str, Any] = {}
    if "preset" in fields:
        preset = given.get("preset", fields["preset"].default)
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(presets)}")
        values |= presets[preset]
    resolved = options(**{**values, **given})
    check_numbers(resolved)
    return resolved


def check_numbers(options: Any) -> None:
    """Check that every number among the options can be computed with.

    Raises:
        ValueError: a number is not finite, or too large.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value.values() if isinstance(value, Mapping) else [value]:
            whole = isinstance(number, int) and abs(number) > MAX_WHOLE
            if whole or (isinstance(number, float) and not abs(number) <= MAX_FLOAT):
                shown = f"{str(number)[:8]}..." if whole else f"{number:g}"
                raise ValueError(f"{flag_of(field)} {shown} is no number to compute with")


def comma_separated(value: str) -> tuple[str, ...]:
    """Return `value` split at its commas, except at those within brackets or quotes.

    Quotes are removed, spaces around a part too, and empty parts are left out.
    """
    parts, depth, quote = [""], 0, ""
    for i, character in enumerate(value):
        escaped = i > 0 and value[i - 1] == "\\"
        if quote or (character in "\"'" and not escaped):
            quote = "" if character == quote else quote or character
            parts[-1] += "" if character in (quote, '"', "'") else character
            continue
        depth += 0 if escaped else (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def key_values(kind: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    """Return a function that parses NAME=VALUE,NAME=VALUE, with `kind` for each VALUE."""

    def read(value: str) -> dict[str, Any]:
        parts = [part.rpartition("=") for part in comma_separated(value)]
        try:
            if not all(key for key, _, _ in parts):
                raise ValueError
            return {key: kind(part) for key, _, part in parts}
        except ValueError:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE,NAME=VALUE") from None

    return read


def _parameter(field: "dataclasses.Field[Any]", kind: Any) -> click.Parameter:
    """Return the option or argument for a field of this type.

    Click gets no default, so that a given value can be told from one that is left out.
    """
    default: Any = field.default
    required = default is dataclasses.MISSING
    if typing.get_origin(kind) in (Union, UnionType) and kind != bool | None:  # X of X | None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    many = typing.get_origin(kind) is tuple
    if field.metadata["argument"]:
        return click.Argument(  # never required, since `command` tells all that is missing at once
            [field.name],
            nargs=-1 if many else 1,
            required=False,
            metavar=field.name.upper() + "..." * many,
        )
    metavar, flag = None, flag_of(field)
    text = field.metadata["help"] + ("  [required]" if required else "")
    if kind is bool:
        text += f"  [default: {flag if default else 'no'}]"
    if field.metadata["repeated"]:
        return click.Option([flag, field.name], multiple=True, help=text)
    if kind in (bool, bool | None):
        return click.Option([f"{flag}/--no-{flag[2:]}", field.name], default=None, help=text)
    if not required and default not in (None, "", ()):
        shown = ",".join(default) if many else str(default)
        shown = f"{default:g}" if isinstance(default, float) else shown
        text += f"  [default: {shown}]"
    if many:
        kind, metavar = comma_separated, "A,B,..."
    if typing.get_origin(kind) is Mapping:
        kind, metavar = key_values(typing.get_args(kind)[1]), "NAME=VALUE,..."
    return click.Option(
        [flag, field.name],
        type=kind,
        help=text,
        metavar=metavar,
    )
