"""A run's folder: who may write to it, and how a run that was stopped goes on."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.trouble import Command
from recipes.pretrain import PretrainOptions
from recipes.shared.runs import continued, locked
from tests.shared import TINY_FLAGS, Run, paint, some, summary
from vitft import load_model, save_model
from vitft.devices.processes import launch_time
from vitft.files import read_tensors


def wait_for_step(state: Path, command: Command) -> None:
    """Wait until a state in the middle of an epoch is saved."""
    until = time.monotonic() + 120
    while command.process.is_alive() and time.monotonic() < until:
        if state.exists() and read_tensors(state)[1]["step"] > 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step was saved: {command.end().said}")


KILLED = ["--epochs=3", "--batch-size=4", "--dropout=0.1", "--save-seconds=1e-9", *TINY_FLAGS]


@pytest.fixture(scope="module")
def whole(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("killed") / "whole"
    vitft("pretrain", *KILLED, "--data", folder, "--out", out)
    return out


@pytest.mark.parametrize(("number", "code"), some([(signal.SIGKILL, -9), (signal.SIGTERM, 130)], 2))
def test_a_killed_run_resumes_bit_for_bit(
    vitft: Run, folder: Path, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    flags = [*KILLED, "--data", folder, "--out", tmp_path]
    command = Command(["pretrain", *flags])
    wait_for_step(tmp_path / "state.safetensors", command)
    command.send(number)
    ended = command.end()
    assert ended.status == code, ended.said
    assert not (tmp_path / "model.safetensors").exists()
    assert code == -9 or "the same command with --resume goes on" in ended.said
    vitft("pretrain", *flags, "--resume")
    model, expected = (folder / "model.safetensors" for folder in (tmp_path, whole))
    assert model.read_bytes() == expected.read_bytes()
    assert summary(tmp_path)["test_loss"] == summary(whole)["test_loss"]


def test_what_a_stopped_run_has_learned_is_there_to_use(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, n_steps = torch.optim.AdamW.step, iter(range(100))

    def step(self: torch.optim.AdamW) -> None:
        plain(self)
        if next(n_steps) == 16:  # 7 steps an epoch: in the third
            os.kill(os.getpid(), signal.SIGTERM)

    flags = ["--adapter=lora", "--base", base, "--data", folder, "--batch-size=8", "--epochs=9"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        told = vitft("finetune", *flags, "--out", tmp_path, code=130).stderr
    facts = summary(tmp_path)
    assert f"goes on; epoch {facts['kept_epoch']} is there to use" in told
    assert facts["stopped"] == "after 2 of 9 epochs"
    assert (facts["test_accuracy"], facts["epochs_done"]) == (None, 2)
    assert "after 2 of 9 epochs" in (tmp_path / "report.html").read_text()
    model = ["--base", base, "--adapter", tmp_path]
    assert "of 12 images" in vitft("evaluate", *model, "--data", folder).stdout
    vitft("compare", tmp_path, "--out", tmp_path / "compared.html")
    vitft("finetune", *flags, "--out", tmp_path, "--resume")
    facts = summary(tmp_path)
    assert facts["epochs_done"] == 9
    assert facts["test_accuracy"] is not None
    assert "stopped" not in facts


def test_a_run_resumes_only_on_its_images_and_its_base(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    data, mine = shutil.copytree(folder, tmp_path / "data"), tmp_path / "mine.safetensors"
    shutil.copy(base, mine)
    flags = ["--adapter=linear", "--base", mine, "--data", data, "--out", tmp_path / "o"]
    vitft("finetune", *flags, "--epochs=1")
    paint(data / "train" / "red" / "new.png", (250, 0, 0))
    told = vitft("finetune", *flags, "--epochs=1", "--resume", code=2).stderr
    assert "was started on other images, classes or another base" in told
    (data / "train" / "red" / "new.png").unlink()
    red = data / "train" / "red" / "000.png"
    red.write_bytes(red.read_bytes() + b"another comment")  # the same name, label and split
    told = vitft("finetune", *flags, "--epochs=1", "--resume", code=2).stderr
    assert "image files have changed since the run in" in told
    shutil.copy(folder / "train" / "red" / "000.png", red)
    vitft("finetune", *flags, "--epochs=2", "--resume")
    other = load_model(mine)
    torch.nn.init.zeros_(other.norm.bias)
    save_model(other, mine)
    assert "another base" in vitft("finetune", *flags, "--epochs=1", "--resume", code=2).stderr


@pytest.mark.parametrize("command", ["resume", "rerun", "from"])
def test_an_option_that_was_edited_in_config_json_is_told(
    command: str, vitft: Run, run: Path, folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    new = ["--data", folder, "--out", tmp_path / "new"]
    given = {
        "resume": ["finetune", "--resume", "--out", out],
        "rerun": ["rerun", out],
        "from": ["finetune", "--from", out, "--epochs=1", *new],
    }[command]
    config = json.loads((out / "config.json").read_text())
    for edited in ({**config, "rank": 4}, {k: v for k, v in config.items() if k != "rank"}):
        (out / "config.json").write_text(json.dumps(edited))
        (line,) = vitft(*given, code=2).stderr.splitlines()
        now = edited.get("rank")
        assert f"was started with rank 8, but its config.json now has {now}; write 8" in line
    moved = shutil.copytree(folder, tmp_path / "moved") if command == "rerun" else folder
    (out / "config.json").write_text(json.dumps({**config, "data": str(moved), "epochs": 4}))
    vitft(*given)


@pytest.mark.parametrize("out", ["train/run", "train/runs/first", "val/run"])
def test_a_run_does_not_become_a_class_of_its_images(
    out: str, vitft: Run, folder: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    shutil.copytree(data / "test", data / "val")
    told = vitft("pretrain", "--data", data, "--out", data / out, *TINY_FLAGS, code=2).stderr
    assert f"{data / out} would be one of the classes in {data}; choose another --out" in told
    assert not (data / out.split("/")[0] / out.split("/")[1]).exists()


def test_nothing_is_lost_to_a_typo_or_to_a_base_in_the_way(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(base.parent, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = ["--data", folder, "--out", out, "--overwrite"]
    vitft("pretrain", *flags, *TINY_FLAGS, "--optimizer=sgd", code=2)
    told = vitft("finetune", *flags, "--adapter=lora", "--rank=2", "--base", out, code=2).stderr
    assert "holds the base, which the run would replace" in told
    merge = ["merge", "--base", out, "--adapter", out, "--out", out / "model.safetensors"]
    assert "is there already" in vitft(*merge, code=2).stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", '{"model_type": "vit"}'), ("config.json", "mine"), ("log.json", "mine")],
)
def test_a_file_of_something_else_is_never_replaced(
    name: str, content: str, vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    events = tmp_path / "events.out.tfevents.1"
    events.write_text("mine")
    (tmp_path / name).write_text(content)
    flags = ["--data", folder, "--epochs=1", "--out", tmp_path]
    told = vitft("finetune", "--adapter=linear", "--base", base, *flags, code=2).stderr
    assert f"{tmp_path / name} is of no run of vitft; choose another --out" in told
    assert (tmp_path / name).read_text() == content
    (tmp_path / name).unlink()
    vitft("finetune", "--adapter=linear", "--base", base, *flags)
    assert events.read_text() == "mine"


def test_folders_named_by_dots_are_known_elsewhere_too(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base.parent, tmp_path / "base")
    monkeypatch.chdir(tmp_path / "base")
    flags = ["--adapter=linear", "--epochs=1", "--base=.", f"--data={folder / 'train'}/.."]
    vitft("finetune", *flags, "--out", tmp_path / "out")
    found = summary(tmp_path / "out")
    assert (found["base"], found["data"]) == (str(tmp_path / "base"), str(folder))
    vitft("finetune", *flags, "--out", tmp_path / "out", "--resume", "--epochs=2")


@pytest.mark.parametrize("command", ["pretrain", "finetune", "sweep"])
def test_two_runs_never_share_a_folder(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, command: str
) -> None:
    given = TINY_FLAGS if command == "pretrain" else ["--base", base, "--adapter=linear"]
    flags = [command, *given, "--data", folder, "--epochs=1", "--out", tmp_path]
    with locked(tmp_path):
        assert "another run writes to" in vitft(*flags, code=2).stderr
    vitft(*flags)
    assert not (tmp_path / ".lock").exists()


def test_a_run_needs_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with locked(tmp_path):
        assert tmp_path.is_dir()


def test_a_sweep_holds_its_runs_too(vitft: Run, folder: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--base", base, "--adapter=linear", "--data", folder, "--out", tmp_path]
    (tmp_path / "seed=1").mkdir()
    with locked(tmp_path / "seed=1"):
        assert "seed=1 now" in vitft("sweep", *flags, "--seeds=2", code=2).stderr


def test_a_start_clears_what_a_killed_run_left_unfinished(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / f".state.safetensors.{'0123456789abcdef' * 2}"
    other = tmp_path / ".gitignore"
    for path in (unfinished, other):
        path.write_bytes(b"x")
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--epochs=1"]
    vitft("finetune", *flags, "--out", tmp_path)
    assert not unfinished.exists()
    assert other.exists()


def test_what_was_never_saved_is_started_by_resume(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--epochs=1"]
    vitft("finetune", *flags, "--out", tmp_path / "new", "--resume")
    assert (tmp_path / "new" / "adapter_config.json").is_file()
    (tmp_path / "new" / "state.safetensors").unlink()
    told = vitft("finetune", *flags, "--out", tmp_path / "new", "--resume", code=2).stderr
    assert "there is no run to resume" in told
    assert "start again with --overwrite" in told
    vitft("finetune", *flags, "--out", tmp_path / "new", "--overwrite")


@pytest.mark.parametrize("saved", ["before", "since", "never"])
@pytest.mark.parametrize("flag", ["overwrite", "resume", None])
def test_a_restart_goes_on_with_what_its_own_launch_has_saved(
    saved: str, flag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.safetensors"
    if saved != "never":
        state.touch()
        os.utime(state, (100, 100))
    started = {"before": 200.0, "since": 50.0, "never": 0.0}[saved]
    monkeypatch.setattr("recipes.shared.runs.launch_time", lambda: started)
    given = {flag: True} if flag else {}
    options = PretrainOptions(data="x", out=str(tmp_path), **given)
    first = continued(options)
    assert first.overwrite == (flag == "overwrite")
    assert first.resume == (flag == "resume" and saved != "never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = continued(options)
    expected = {"since": (True, False), "before": (flag == "resume", flag == "overwrite")}
    assert (again.resume, again.overwrite) == expected.get(saved, (False, flag == "overwrite"))


def test_a_launch_was_before_this_process() -> None:
    assert 0 < launch_time() < time.time()
