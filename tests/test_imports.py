import subprocess
import sys
from pathlib import Path

import pytest

import adapters
import recipes
import vitft
from tests.shared import long
from vitft.command.help import COMMANDS


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages that `code` imports without a word."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return set(line.split())


def loaded_after_help(*words: str) -> set[str]:
    """Return the top-level packages that the command line imports to print a help."""
    return loaded_after(
        f"""
import io, contextlib
from vitft.command.cli import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli([{", ".join(map(repr, words))}])
"""
    )


@long
def test_adapters_and_vitft_stand_alone() -> None:
    """One process loads both, since torch takes long: adapters, which it forgets, then vitft."""
    home = Path(vitft.__file__).parents[1]
    paths = [path.relative_to(home).with_suffix("") for path in home.glob("vitft/**/*.py")]
    names = [".".join(path.parts) for path in paths if path.stem[0] != "_"]
    code = f"""
import adapters, sys
assert not sys.modules.keys() & {{"vitft", "recipes", "torchvision", "click", "peft"}}
for name in [name for name in sys.modules if name.partition(".")[0] == "adapters"]:
    del sys.modules[name]
import {", ".join(names)}"""
    assert not loaded_after(code) & {"adapters", "recipes", "torchvision", "matplotlib"}


@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"]])
def test_help_imports_no_torch(words: list[str]) -> None:
    heavy = {"torch", "numpy", "PIL", "tqdm", "adapters", "recipes"}
    assert not loaded_after_help(*words) & heavy


@pytest.mark.parametrize("package", [adapters, recipes, vitft])
def test_the_three_packages_stand_side_by_side(package: object) -> None:
    assert Path(package.__file__).parents[1] == Path(__file__).parents[1]  # type: ignore[attr-defined]


def test_every_command_has_a_recipe() -> None:
    recipes_there = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")}
    assert set(COMMANDS) <= recipes_there


@long
def test_the_recipe_is_called_by_its_modules_name_too() -> None:
    code = "import recipes\ntry: recipes.finetune(adapter='lora')\n"
    code += "except TypeError as error: print(error, flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "required" in done.stdout, done.stderr
