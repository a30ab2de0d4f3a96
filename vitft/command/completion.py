"""A command's saved help in; a command with the same options, for the shell's completion, out."""

import re

import click

from vitft.command.help import COMMANDS, saved_help

OPTION = re.compile(r"^  (?:(-\w), )?(--[\w-]+)(?: / (--[\w-]+))?( [A-Z])?", re.MULTILINE)


def command_from_help(name: str) -> click.Command:
    """Return a command that has the options of this one but does nothing.

    Its recipe, and so torch, is not imported, which would make completion slow. The value of any
    option, and any argument, is completed as a file's path.
    """
    path = click.Path()
    options: list[click.Parameter] = [
        click.Option([flag], type=path)
        if takes
        else click.Option([f"{flag}/{off}" if off else flag, *short.split()], is_flag=True)
        for short, flag, off, takes in OPTION.findall(saved_help(name))
        if flag != "--help"  # which every command has
    ]
    files = click.Argument(["file"], nargs=-1, type=click.Path())
    return click.Command(name, params=[*options, files], short_help=COMMANDS[name])
