"""The wheel: what `pip install` gives works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.shared import slow
from vitft.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = ("vitft", "adapters", "recipes")
LOAD = "import vitft, recipes, adapters; print(vitft.__file__, vitft.load_model('cifar10').classes)"


@slow
def test_the_wheel_is_whole_and_works_outside_the_checkout(tmp_path: Path) -> None:
    source, unpacked, empty = (tmp_path / name for name in ("source", "unpacked", "empty"))
    empty.mkdir()
    for name in PACKAGES:  # a copy, since building leaves files
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, source, "--wheel-dir", tmp_path], check=True)
    (wheel,) = tmp_path.glob(f"vitft-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {*file.namelist()}
        file.extractall(unpacked)
    here = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"vitft/command/help.json", "vitft/bases/cifar10.safetensors"} <= here
    assert {"recipes/serving/page.html", "vitft/py.typed", "recipes/py.typed"} <= here
    assert here <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {*PACKAGES}

    def python(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(unpacked)}
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=empty)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-m", "vitft", "--version").startswith(f"vitft {__version__} (")
    assert "cifar10" in python("-m", "vitft", "data")
    loaded = python("-c", LOAD)
    assert loaded.startswith(str(unpacked))
    assert "'airplane'" in loaded
