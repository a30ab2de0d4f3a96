"""A sweep whose runs are shared out: by a plan, by shares, over Ray; each ends as in one pass."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.shared.finetuning import FinetuneOptions
from recipes.shared.summary import COMPUTED
from recipes.sweeping.grid import SweepOptions, combinations
from recipes.sweeping.plans import share
from tests.shared import Run, long, slow
from vitft.command import options as cli
from vitft.command.options import arguments_of

GRID = ["--rank=1,2", "--lr=1e-2,3e-2"]
pytestmark = long
FLAGS = ["--adapter=lora", "--epochs=1", "--batch-size=16", "--layers=1", "--no-cache-features"]


@pytest.fixture(scope="module")
def whole(vitft: Run, folder: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the sweep in one pass."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    vitft("sweep", *FLAGS, *GRID, "--base", base, "--data", folder, "--out", out)
    return out


def assert_same_sweep(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir() if path.is_dir())
    assert names == sorted(path.name for path in other.iterdir() if path.is_dir())
    assert len(names) == 4
    for name in names:
        a, b = (load_file(out / name / "adapter_model.safetensors") for out in (one, other))
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, atol=2e-3, rtol=0)
    best = [json.loads((out / "sweep.json").read_text())["best"] for out in (one, other)]
    assert [Path(found["folders"][0]).name for found in best] == [
        Path(best[0]["folders"][0]).name
    ] * 2


def test_a_plan_trains_what_the_sweep_would(
    vitft: Run, folder: Path, base: Path, whole: Path, tmp_path: Path
) -> None:
    common = [*FLAGS, *GRID, "--base", base, "--data", folder, "--out", tmp_path / "out"]
    done = vitft("sweep", *common, "--plan", tmp_path / "plan.sh")
    assert "4 commands" in done.stdout
    assert not (tmp_path / "out").exists()
    for line in (tmp_path / "plan.sh").read_text().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "vitft"
        vitft(*arguments)
    found = [*(tmp_path / "out").glob("*/summary.json")]
    for path in found:  # as if each had been computed elsewhere
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "far", "seconds": 9}))
    before = {path: json.loads(path.read_text()) for path in found}
    vitft("sweep", *common, "--resume")
    assert_same_sweep(tmp_path / "out", whole)
    (best,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["best"]["folders"]
    for path, was in before.items():
        now = json.loads(path.read_text())
        if path.parent == Path(best):  # it is tested again
            assert [now.get(key) for key in COMPUTED] == [was.get(key) for key in COMPUTED]
            assert now["test_accuracy"] == was["test_accuracy"] is not None
        else:
            assert now == was


def test_a_plan_names_any_folder(vitft: Run, tmp_path: Path) -> None:
    data, plan = os.fsdecode(b"'\xff"), tmp_path / "plan.sh"
    given = ["--adapter=lora", "--base=cifar10", f"--data={data}", "--out", tmp_path / "out"]
    vitft("sweep", *given, *GRID, "--plan", plan)
    lines = plan.read_bytes().splitlines()
    assert len(lines) == 4
    assert all(f"--data={data}" in shlex.split(os.fsdecode(line)) for line in lines)


@pytest.mark.parametrize("flag", ["--only=1/2", "--ray"])
def test_a_plan_is_of_all_runs_and_trains_none(flag: str, vitft: Run, tmp_path: Path) -> None:
    given = ["--adapter=lora", "--base=cifar10", "--data=shapes", "--out", tmp_path / "out"]
    told = vitft("sweep", *given, *GRID, "--plan", tmp_path / "plan.sh", flag, code=2).stderr
    assert f"leave out {flag.partition('=')[0]}" in told
    assert not [*tmp_path.iterdir()]


def test_a_plan_of_runs_that_cannot_be_is_refused(vitft: Run, tmp_path: Path) -> None:
    given = ["--adapter=lora", "--base=elsewhere", "--data=there", "--out", tmp_path / "out"]
    vitft("sweep", *given, "--rank=1,2", "--plan", tmp_path / "plan.sh")
    (tmp_path / "plan.sh").unlink()
    told = vitft("sweep", *given, "--rank=1,0", "--plan", tmp_path / "plan.sh", code=2).stderr
    assert "rank=0 is not a positive integer" in told
    assert not [*tmp_path.iterdir()]


def test_shares_of_a_sweep_make_the_whole(
    vitft: Run, folder: Path, base: Path, whole: Path, tmp_path: Path
) -> None:
    common = [*FLAGS, *GRID, "--base", base, "--data", folder, "--out", tmp_path]
    done = vitft("sweep", *common, "--only=2/2")
    assert "the best        is picked by the same command with --resume" in done.stdout
    assert not (tmp_path / "sweep.json").exists()
    assert len([*tmp_path.iterdir()]) == 2
    vitft("sweep", *common, "--only=1/2")
    vitft("sweep", *common, "--resume")
    assert_same_sweep(tmp_path, whole)


@slow
@pytest.mark.filterwarnings("ignore")
def test_ray_trains_what_the_sweep_would(
    vitft: Run, folder: Path, base: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    common = [*FLAGS, *GRID, "--base", base, "--data", folder, "--out", tmp_path]
    done = vitft("sweep", *common, "--ray")
    assert "test accuracy" in done.stdout
    assert_same_sweep(tmp_path, whole)


@pytest.mark.parametrize("only", ["0/2", "3/2", "1/5", "1", "a/b", "-1/2"])
def test_a_share_that_is_none_is_refused(only: str) -> None:
    with pytest.raises(ValueError, match=r"--only .* names no share of 4 runs; write I/N"):
        share([*"abcd"], only)


def test_shares_are_all_runs_once() -> None:
    parts = [share([*"abcdefg"], f"{i}/3") for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == [*"abcdefg"]
    assert parts[2] == ["c", "f"]


def test_arguments_give_the_options_that_they_were_made_of() -> None:
    given = {
        "adapter": "lora",
        "base": "a base",
        "data": "x",
        "out": "y",
        "lr": ("0.001", "0.01"),
        "targets": ("wq", r"blocks\.[0,1]\.attn\.wv"),
        "layers": ("0-1",),
        "flip": True,
        "cache_features": False,
        "save_seconds": 0.0,
        "seed": 4,
        "use_rslora": True,
    }
    for _, made in combinations(SweepOptions(**given)):
        seen: list[object] = []
        command = cli.command("finetune", FinetuneOptions, seen.append, {"default": {}})
        command.main(arguments_of(made), standalone_mode=False)
        assert seen == [made]
