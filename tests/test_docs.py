"""The Python of README.md and docs/part-2.md runs, and their commands have the options shown."""

import importlib
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest

import adapters

ROOT = Path(__file__).parents[1]
README, PART_2 = ROOT / "README.md", ROOT / "docs" / "part-2.md"
PHOTOGRAPHS = ROOT / "docs" / "photographs.md"
MANY_MACHINES = ROOT / "docs" / "many-machines.md"
SERVING, SHARING = ROOT / "docs" / "serving.md", ROOT / "docs" / "sharing.md"


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """Return each fenced block of a language, and the number of lines before it."""
    text = document.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(document: Path, **replaced: str) -> None:
    """Execute a document's Python, with some of its text replaced."""
    namespace: dict[str, object] = {"__name__": document.stem}
    with patch.dict(adapters.METHODS):  # it may add a method
        for line, code in blocks(document, "python"):
            for old, new in replaced.items():
                assert old in code
                code = code.replace(old, new)
            # the blank lines let a traceback show the line of the document
            exec(compile("\n" * line + code, document, "exec"), namespace)


def test_the_python_of_part_2_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(PART_2)
    assert len(blocks(PART_2, "python")) > 10
    assert (tmp_path / "symbols" / "adapter_config.json").is_file()


def test_the_readmes_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(README, **{"range(60)": "range(2)", "1000": "10"})
    assert "of 10" not in capsys.readouterr().out
    assert (tmp_path / "runs" / "symbols" / "adapter_model.safetensors").is_file()


def test_the_python_of_photographs_runs(
    base: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    image = folder / "test" / "red" / "000.png"
    given = {"dinov2-small/": str(base), '"DATA"': f'"{folder}"', "photo.jpg": str(image)}
    run(PHOTOGRAPHS, **given)
    assert "'red': " in capsys.readouterr().out


def commands() -> list[str]:
    lines = [
        line
        for d in (README, PART_2, PHOTOGRAPHS, MANY_MACHINES, SERVING, SHARING)
        for _, block in blocks(d, "sh")
        for line in block.splitlines()
    ]
    inline = re.findall(r"`(vitft \w+ --[^`]* --[^`]*)`", PART_2.read_text())
    lines = [re.sub(r"^.*torchrun .* -m vitft", "vitft", line) for line in lines]
    return [line for line in lines if line.startswith("vitft ")] + inline


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_documents_has_these_options(line: str) -> None:
    _, name, *arguments = shlex.split(line.replace(" ...", ""), comments=True)
    importlib.import_module(f"recipes.{name}").command.make_context(name, arguments)


def test_the_readme_names_every_folder() -> None:
    text = README.read_text()
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("[a-z]*/**/*.py")}
    folders = {folder for folder in folders if folder.parts[0] in ("vitft", "adapters", "recipes")}
    assert all(f"{folder}/" in text for folder in folders)
