"""Commands without their recipes, for the shell's completion: their options, read from the help."""

import re

import click

from vitft.command.help import COMMANDS, kept

OPTION = re.compile(r"^  (?:(-\w), )?(--[\w-]+)(?: / (--[\w-]+))?( [A-Z])?", re.MULTILINE)


def sketch(name: str) -> click.Command:
    """Return a command with the options of this one, which does nothing; values may be files."""
    path = click.Path()
    options: list[click.Parameter] = [
        click.Option([flag], type=path)
        if takes
        else click.Option([f"{flag}/{off}" if off else flag, *short.split()], is_flag=True)
        for short, flag, off, takes in OPTION.findall(kept(name))
        if flag != "--help"  # which every command has
    ]
    files = click.Argument(["file"], nargs=-1, type=click.Path())
    return click.Command(name, params=[*options, files], short_help=COMMANDS[name])
