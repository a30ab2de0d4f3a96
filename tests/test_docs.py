"""What docs/part-2.md shows runs: its Python in order, its commands as far as their options go."""

import importlib
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest

import adapters

PART_2 = Path(__file__).parents[1] / "docs" / "part-2.md"


def blocks(language: str) -> list[tuple[int, str]]:
    """Return each fenced block of a language, and the number of lines before it."""
    text = PART_2.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def test_the_python_of_part_2_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "part_2"}
    with patch.dict(adapters.METHODS):  # it adds a method
        for line, code in blocks("python"):
            # the blank lines let a traceback show the line of the document
            exec(compile("\n" * line + code, PART_2, "exec"), namespace)
    assert len(blocks("python")) > 10
    assert (tmp_path / "symbols" / "adapter_config.json").is_file()


def commands() -> list[str]:
    inline = re.findall(r"`(vitft \w+ --[^`]* --[^`]*)`", PART_2.read_text())
    return [line for _, block in blocks("sh") for line in block.splitlines()] + inline


@pytest.mark.parametrize("line", commands())
def test_a_command_of_part_2_has_these_options(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "vitft"
    importlib.import_module(f"recipes.{name}").command.make_context(name, arguments)
