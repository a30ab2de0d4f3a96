"""A dataclass of options in, a click command out.

Names, defaults and help texts stand once, in the dataclass.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union

import click
from click.core import ParameterSource

from vitft.command.telling import tell_start, telling

TELLING = (  # options of every command
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


MAX_WHOLE, MAX_FLOAT = 2**62, 1e30  # torch's numbers, with room to multiply


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    argument: bool = False,
    repeated: bool = False,
) -> Any:
    """Return a dataclass field that is also a command-line option, required if without default.

    Args:
        default: what holds when the option is not given; a tuple is written with commas.
        help: one line for `--help`.
        argument: positional instead, any number of values for a tuple, else one.
        repeated: given once for every value of a tuple, not with commas.
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
    """Return the command `name` that calls `run` with an `options` made of what the user gave.

    With `presets`, the field `preset` names one. The order is: what the user gave, then what
    `recall` knows, then the preset, then the defaults.

    Args:
        name: of the command.
        options: a dataclass of fields made by `option`.
        run: takes one.
        presets: values by name.
        recall: given what the user gave, returns what an earlier run was given.
    """

    def callback(*, quiet: bool, verbose: bool, **given: Any) -> None:
        with telling(quiet=quiet, verbose=verbose):
            made = _made(given)
            tell_start(name, made)
            run(made)

    def _made(given: dict[str, Any]) -> Any:
        source = click.get_current_context().get_parameter_source
        given = {key: v for key, v in given.items() if source(key) is not ParameterSource.DEFAULT}
        for key, value in given.items():
            if isinstance(value, str) and not value.strip():
                raise click.UsageError(f"{names[key]} is empty; give it a value or leave it out")
            if isinstance(value, tuple) and not all(str(part).strip() for part in value):
                raise click.UsageError(f"a part of {names[key]} is empty; leave it out")
        given = (recall(given) if recall else {}) | given
        if missing := [flag_of(field) for field in needed if field.name not in given]:
            raise click.UsageError(
                f"missing: {', '.join(missing)}; vitft {name} --help tells what to give"
            )
        return resolve(options, given, presets or {})

    types = typing.get_type_hints(options)
    fields = [field for field in dataclasses.fields(options) if field.init]
    needed = [field for field in fields if field.default is dataclasses.MISSING]
    names = {
        field.name: field.name.upper() if field.metadata["argument"] else flag_of(field)
        for field in fields
    }
    parameters = [_parameter(field, types[field.name]) for field in fields]
    arguments = [
        f"{f.name.upper()}: {f.metadata['help']}" for f in fields if f.metadata["argument"]
    ]
    text = "\n\n".join([options.__doc__ or "", *arguments])
    return click.Command(name, callback=callback, params=[*parameters, *TELLING], help=text)


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
        ValueError: an unknown preset, or a number beyond all use.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    values: dict[str, Any] = {}
    if "preset" in fields:
        preset = given.get("preset", fields["preset"].default)
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(presets)}")
        values |= presets[preset]
    made = options(**{**values, **given})
    check_numbers(made)
    return made


def check_numbers(options: Any) -> None:
    """Check that no number among options is beyond what anything computes with.

    Raises:
        ValueError: one is.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value.values() if isinstance(value, Mapping) else [value]:
            whole = isinstance(number, int) and abs(number) > MAX_WHOLE
            if whole or (isinstance(number, float) and not abs(number) <= MAX_FLOAT):
                shown = f"{str(number)[:8]}..." if whole else f"{number:g}"
                raise ValueError(f"{flag_of(field)} {shown} is no number to compute with")


def comma_separated(value: str) -> tuple[str, ...]:
    """Return the parts of `value` between its commas, but not those in brackets or quotes."""
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
    """Return a function that reads NAME=VALUE,NAME=VALUE, with values of this kind."""

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
    default: Any = field.default
    required = default is dataclasses.MISSING
    if typing.get_origin(kind) in (Union, UnionType) and kind != bool | None:  # X of X | None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    many = typing.get_origin(kind) is tuple
    if field.metadata["argument"]:
        return click.Argument([field.name], nargs=-1 if many else 1, required=required)
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
