"""`vitft rerun` does a run again and says whether the result is the same, and what differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.shared import TINY_FLAGS, Run, long, paint, some
from vitft import load_model, save_model
from vitft.files import read_tensors, write_tensors

pytestmark = long
FLAGS = ["--epochs=2", "--batch-size=16", "--flip", "--mixup=0.3", "--seed=5"]


@pytest.mark.parametrize(
    ("threads", "streamed"), some([(2, True), (1, True), (2, False), (1, False)], 2)
)
def test_a_run_done_again_is_the_same_to_the_bit(
    threads: int,
    streamed: bool,
    vitft: Run,
    folder: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(threads)
    if streamed:
        monkeypatch.setattr("vitft.pictures.images.max_set_bytes", lambda device: 0)
    flags = ["--adapter=lora", "--base", base, "--data", folder, "--dropout=0.1", *FLAGS]
    vitft("finetune", *flags, "--out", tmp_path / "run")
    done = vitft("rerun", tmp_path / "run")
    assert "the same        to the last bit" in done.stdout
    assert str(tmp_path / "run-again") in done.stdout


def test_what_differs_is_told(vitft: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    vitft("pretrain", "--data", folder, "--out", out, *FLAGS, *TINY_FLAGS)
    tensors = load_file(out / "model.safetensors")
    tensors["head.bias"][1] += 0.25
    written = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(written[:8], "little")
    metadata = json.loads(written[8 : 8 + length])["__metadata__"]
    save_file(tensors, out / "model.safetensors", metadata)
    summary = json.loads((out / "summary.json").read_text())
    summary["versions"]["torch"], summary["device"] = "2.0.0", "a faster one"
    summary["n_processes"] = 2
    (out / "summary.json").write_text(json.dumps(summary))
    done = vitft("rerun", out, "--out", tmp_path / "again")
    assert "not the same    largest difference 0.25" in done.stdout
    assert "other versions  of torch" in done.stdout
    assert "other devices   a faster one then, cpu" in done.stdout
    assert "other processes 2 then, 1 now; torchrun starts as many" in done.stdout
    told = json.loads(vitft("rerun", out, "--out", tmp_path / "third", "--json").stdout)
    assert not told["same"]
    assert told["largest_difference"] == pytest.approx(0.25)
    assert "holds a run already" in vitft("rerun", out, "--out", tmp_path / "third", code=2).stderr


def test_other_epochs_that_were_planned_first_are_told(
    vitft: Run, folder: Path, tmp_path: Path
) -> None:
    flags = ["--data", folder, "--out", tmp_path / "run", *FLAGS, *TINY_FLAGS]
    vitft("pretrain", *flags, "--epochs=1")
    assert "other epochs" not in vitft("rerun", tmp_path / "run").stdout
    vitft("pretrain", *flags, "--epochs=3", "--resume")
    vitft("pretrain", *flags, "--epochs=3", "--resume")  # changes nothing
    told = vitft("rerun", tmp_path / "run", "--overwrite").stdout
    assert "not the same" in told
    assert "other epochs    1, then 3 were planned then, by --resume, and with them other" in told


@pytest.mark.parametrize("change", [{"planned": 5}, {"belongs": {}}, {"contents": [1]}])
def test_a_state_that_says_odd_things_gives_no_reasons(
    change: dict[str, object], vitft: Run, run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    tensors, progress = read_tensors(out / "state.safetensors")
    write_tensors(out / "state.safetensors", tensors, progress | change)
    assert "other" not in vitft("rerun", out).stdout


def test_another_base_in_its_place_is_told(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copy(base, tmp_path / "mine.safetensors"))
    flags = ["--adapter=bitfit", "--base", mine, "--data", folder, *FLAGS, "--epochs=1"]
    vitft("finetune", *flags, "--out", tmp_path / "run")
    assert "another base" not in vitft("rerun", tmp_path / "run").stdout
    other = load_model(mine)
    torch.nn.init.ones_(other.blocks[0].attn.wq.weight)
    save_model(other, mine)
    done = vitft("rerun", tmp_path / "run", "--overwrite")
    assert "not the same" in done.stdout
    assert "another base    than the run's is in its place" in done.stdout
    assert "other images" not in done.stdout


def test_what_cannot_be_done_again_is_told(vitft: Run, tmp_path: Path) -> None:
    assert "there is no run to do again" in vitft("rerun", tmp_path, code=2).stderr
    (tmp_path / "summary.json").write_text("[1")
    assert "summary.json is broken" in vitft("rerun", tmp_path, code=2).stderr
    (tmp_path / "summary.json").write_text('{"versions": {}, "stopped": "after 1 of 3 epochs"}')
    told = vitft("rerun", tmp_path, code=2).stderr
    assert "was stopped after 1 of 3 epochs; --resume it first" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"file": 5}, "summary.json: file: Expected str"),
        ({"test_accuracy": "x"}, "summary.json: test_accuracy: Expected float"),
        ({"versions": [["torch", "2"]]}, "summary.json: versions: Expected object"),
        ({"file": "gone.safetensors"}, "there is no file"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_broken_is_told_before_anything_is_trained(
    change: object, told: str, vitft: Run, run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    if isinstance(change, dict):
        change = json.dumps(json.loads((out / "summary.json").read_text()) | change)
    (out / "summary.json").write_text(str(change))
    (line,) = vitft("rerun", out, code=2).stderr.splitlines()
    assert told in line
    assert not (tmp_path / "run-again").exists()


def test_a_run_is_not_replaced_by_its_second(vitft: Run, run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    before = (out / "summary.json").read_bytes()
    for itself in (out, out / ".." / "run"):
        told = vitft("rerun", out, "--out", itself, "--overwrite", code=2).stderr
        assert "holds the run itself; choose another --out" in told
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.parametrize(("where", "name"), [(".", "."), ("below", "..")])
def test_a_run_named_by_dots_is_done_again_beside_it(
    where: str, name: str, vitft: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    (out / "below").mkdir()
    monkeypatch.chdir(out / where)
    vitft("rerun", name)
    assert (tmp_path / "run-again" / "summary.json").is_file()


def test_other_images_and_the_base_of_full_are_told(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    data, mine = shutil.copytree(folder, tmp_path / "data"), tmp_path / "mine.safetensors"
    shutil.copy(base, mine)
    flags = ["--adapter=full", "--base", mine, "--data", data, "--epochs=1"]
    vitft("finetune", *flags, "--out", tmp_path / "run")
    paint(data / "train" / "red" / "new.png", (250, 0, 0))
    done = vitft("rerun", tmp_path / "run").stdout
    told = "other images    than the run's: some were added, removed, moved or changed"
    assert told in done
    assert "another base" not in done
    (data / "train" / "red" / "new.png").unlink()
    red = data / "train" / "red" / "000.png"
    paint(red, (255, 40, 40), (30, 9))
    assert told in vitft("rerun", tmp_path / "run", "--overwrite").stdout
    shutil.copy(folder / "train" / "red" / "000.png", red)
    other = load_model(mine)
    torch.nn.init.ones_(other.blocks[0].attn.wq.weight)
    save_model(other, mine)
    done = vitft("rerun", tmp_path / "run", "--overwrite").stdout
    assert "another base    than the run's is in its place" in done
    assert "other images" not in done


def test_the_others_of_a_sweep_are_told(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=lora", "--base", base, "--data", folder, "--epochs=1"]
    vitft("sweep", *flags, "--lr=1e-3,1e-2,3e-2", "--out", tmp_path)
    done = vitft("rerun", tmp_path / "lr=0.001,seed=0", "--out", tmp_path / "again")
    assert "other adapters  2 trained in the same pass then, none now" in done.stdout
    assert "other adapters" not in vitft("rerun", tmp_path / "again").stdout


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_went_on_is_done_again_from_where_it_began(
    method: str, vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--data", folder, "--epochs=1"]
    first, then = tmp_path / "first", tmp_path / "then"
    vitft("finetune", "--adapter", method, "--base", base, *flags, "--out", first)
    vitft("finetune", "--from", first, *flags, "--out", then)
    assert "the same        to the last bit" in vitft("rerun", then).stdout
