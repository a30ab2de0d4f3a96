"""The help that is saved_help is the help that the commands' options make."""

import json

import pytest

from tests.shared import Run
from vitft.command.help import COMMANDS, FILE, current_help, saved_help


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_kept_is_what_is_made(name: str, vitft: Run) -> None:
    assert saved_help(name) == current_help(name), "write it anew: python -m vitft.command.help"
    assert vitft(name, "--help").stdout == vitft(name, "-h").stdout == saved_help(name)
    assert "\n      " not in saved_help(name).partition("\nOptions:")[0], (
        "as the docstring is indented"
    )


def test_no_help_is_kept_for_a_command_that_is_gone() -> None:
    assert json.loads(FILE.read_text()).keys() == COMMANDS.keys()
