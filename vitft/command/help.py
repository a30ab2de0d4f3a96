"""The help of every command as text, kept so that `--help` imports no recipe, and no torch.

`python -m vitft.command.help` writes it anew from the commands; a test compares them.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

import click

FILE = Path(__file__).with_name("help.json")
WIDTH = 100


def kept(name: str) -> str:
    """Return the help of a command as it is kept."""
    text: str = json.loads(FILE.read_text())[name]
    return text


def made(name: str) -> str:
    """Return the help of a command, made from its options."""
    command: click.Command = importlib.import_module(f"recipes.{name}").command
    context = click.Context(
        command, info_name=f"vitft {name}", terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    return command.get_help(context) + "\n"


def write(names: Iterable[str]) -> None:
    """Keep the help of these commands."""
    FILE.write_text(json.dumps({name: made(name) for name in names}, indent=1) + "\n")


if __name__ == "__main__":
    from vitft.command.cli import COMMANDS

    write(COMMANDS)
