"""What a shell offers to complete a line with, and how long that takes."""

import importlib
import os
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from vitft.command.cli import cli
from vitft.command.completion import command_from_help
from vitft.command.help import COMMANDS


def offered(*words: str) -> list[tuple[str, str]]:
    *before, last = words
    items = ShellComplete(cli, {}, "vitft", "_VITFT_COMPLETE").get_completions(before, last)
    return [(item.value, item.type) for item in items]


def test_commands_options_and_files_are_offered() -> None:
    assert offered("pre") == [("pretrain", "plain"), ("predict", "plain")]
    assert offered("--vers") == [("--version", "plain")]
    assert offered("finetune", "--ad") == [("--adapter", "plain")]
    assert offered("finetune", "--flip", "--no-ca") == [
        ("--no-calibrate", "plain"),
        ("--no-cache-features", "plain"),
    ]
    assert offered("finetune", "--data", "pho") == [("pho", "file")]
    assert offered("predict", "--help", "pho") == [("pho", "file")]
    assert offered("none", "x") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_offered(name: str) -> None:
    def flags(command: click.Command) -> dict[str, bool]:
        options = [p for p in command.params if isinstance(p, click.Option)]
        return {flag: p.is_flag for p in options for flag in (*p.opts, *p.secondary_opts)}

    assert flags(command_from_help(name)) == flags(
        importlib.import_module(f"recipes.{name}").command
    )


def test_completing_imports_no_torch() -> None:
    code = "import sys; from vitft.command.cli import main\ntry: main()\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    asked = {"_VITFT_COMPLETE": "bash_complete", "COMP_WORDS": "vitft finetune --ad"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'vitft'\n" + code],
        capture_output=True,
        text=True,
        env=os.environ | asked | {"COMP_CWORD": "2"},
    )
    assert done.stdout == "plain,--adapter\n"
    assert not {"torch", "numpy", "recipes"} & {*done.stderr.split()}
