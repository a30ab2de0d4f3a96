import subprocess
import sys
from pathlib import Path

import pytest

import adapters
import recipes
import vitft
from vitft.command.help import COMMANDS


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages that `code` imports."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_adapters_stands_alone() -> None:
    assert not loaded_after("import adapters") & {
        "vitft",
        "recipes",
        "torchvision",
        "click",
        "peft",
    }


def test_vitft_knows_neither_adapters_nor_recipes() -> None:
    home = Path(vitft.__file__).parents[1]
    paths = [path.relative_to(home).with_suffix("") for path in home.glob("vitft/**/*.py")]
    names = [".".join(path.parts) for path in paths if path.stem[0] != "_"]
    found = loaded_after("import " + ", ".join(names))
    assert not found & {"adapters", "recipes", "torchvision", "matplotlib"}


def test_help_imports_no_torch() -> None:
    code = "from vitft.command.cli import cli\ntry: cli(['--help'])\nexcept SystemExit: pass"
    assert not loaded_after(code) & {"torch", "numpy", "PIL", "tqdm", "adapters", "recipes"}


def test_the_help_of_a_command_imports_no_torch() -> None:
    run = "try: cli(['finetune', '--help'])\nexcept SystemExit: pass"
    code = "from vitft.command.cli import cli\n" + run
    assert not loaded_after(code) & {"torch", "numpy", "PIL", "tqdm", "adapters", "recipes"}


@pytest.mark.parametrize("package", [adapters, recipes, vitft])
def test_the_three_packages_stand_side_by_side(package: object) -> None:
    assert Path(package.__file__).parents[1] == Path(__file__).parents[1]  # type: ignore[attr-defined]


def test_importing_is_silent() -> None:
    code = "import adapters, recipes, vitft; vitft.VisionTransformer; vitft.load_model"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


def test_every_command_has_a_recipe() -> None:
    recipes_there = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")}
    assert set(COMMANDS) <= recipes_there
