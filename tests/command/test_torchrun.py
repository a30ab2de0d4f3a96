"""`torchrun -m vitft`: a process that dies is started again, one that fails ends all, told once."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.shared import TINY_FLAGS, Run, slow, summary
from vitft.command import cli

FLAGS = ["--epochs=4", "--batch-size=8", "--save-seconds=1e-9", "--dropout=0.2", *TINY_FLAGS]


def torchrun(
    how: str, folder: Path, out: Path, *options: str
) -> "subprocess.CompletedProcess[str]":
    """Pretrain in two processes, of which the second dies or fails on its way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options]
    command += [str(Path(__file__).with_name("dying.py")), how]
    command += ["pretrain", f"--data={folder}", f"--out={out}", *FLAGS]
    path = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "rerun", "evaluate"])
def test_what_trains_is_known_to_be_one_of_several(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vitft", command])
    assert not cli._is_distributed()
    monkeypatch.setenv("RANK", "1")  # so that only the first writes
    assert cli._is_distributed()


@pytest.mark.parametrize("command", ["sweep", "predict", "merge"])
def test_what_is_one_process_is_refused_once(
    command: str, vitft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    (line,) = vitft(command, code=2).stderr.splitlines()
    assert f"{command} is one process; start it without torchrun" in line
    monkeypatch.setenv("RANK", "1")
    assert vitft(command, code=2).stderr == ""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "missing: " in vitft(command, code=2).stderr


@slow
def test_a_model_is_measured_by_all_processes_and_its_figures_are_told_once(
    folder: Path, base: Path, vitft: Run
) -> None:
    flags = ["evaluate", f"--base={base}", f"--data={folder}", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=150)
    done = run([*command, "--", "vitft", *flags])
    assert done.returncode == 0, done.stderr
    together, alone = json.loads(done.stdout), json.loads(vitft(*flags).stdout)
    assert together.pop("data") == alone.pop("data")
    assert together == pytest.approx(alone, rel=1e-5)


@slow
def test_what_a_killed_process_left_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    for how in ("killed", "lives"):
        done = torchrun(how, folder, tmp_path / how, "--max-restarts=1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1
    killed, lives = (load_file(tmp_path / how / "model.safetensors") for how in ("killed", "lives"))
    for name, value in lives.items():
        assert torch.equal(killed[name], value), name
    found = summary(tmp_path / "killed")
    assert (found["n_processes"], found["epochs_done"]) == (2, 4)


@slow
def test_a_process_that_fails_ends_all_and_its_error_is_told_once(
    folder: Path, tmp_path: Path
) -> None:
    done = torchrun("fails", folder, tmp_path / "two")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith(("Error:", "Stopped:"))]
    assert ours == ["Error: the disk of the second process is gone"]
    assert (tmp_path / "two" / "state.safetensors").is_file()
