"""What a command says when it is stopped or memory runs out."""

import re
import sys

import click
import pytest

from vitft.command import cli
from vitft.command.help import saved_help


def test_a_stop_without_a_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    error = click.Abort()  # as click makes it of a signal
    error.__cause__ = KeyboardInterrupt()
    assert cli._status(error) == 130
    assert capsys.readouterr().err == "Stopped: interrupted\n"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("command", ["pretrain", "finetune", "sweep", "evaluate", "rerun", "merge"])
def test_what_takes_less_memory_is_an_option_of_the_command(
    command: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vitft", command])
    monkeypatch.setenv("RANK", "0") if several else monkeypatch.delenv("RANK", raising=False)
    named = {*re.findall(r"--[a-z-]+", cli._less_memory())}
    known = {*re.findall(r"--[a-z-]+", saved_help(command))}
    refused = {"sweep": {"--auto-batch", "--checkpoint-blocks"}}.get(command, set())
    assert named <= known - refused - ({"--auto-batch"} if several else set())
    assert bool(named) is (command not in ("rerun", "merge"))
