"""A run goes on: with `--resume` and nothing else, and on new images with `--from`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.shared.finetuning import recalled
from tests.shared import Run, long, paint, summary


def tensors(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def test_resume_needs_nothing_but_the_folder(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--adapter=lora", "--rank=3", "--targets=wq,w1", "--lr=2e-3", "--keep=last"]
    flags += ["--schedule=constant", "--warmup=0"]  # no epoch's rate depends on their number
    given = ["--base", base, "--data", folder, "--batch-size=8", *flags]
    vitft("finetune", *given, "--out", out, "--epochs=2")
    vitft("finetune", "--resume", "--out", out, "--epochs=4")
    assert summary(out)["epochs_done"] == 4
    vitft("finetune", *given, "--out", tmp_path / "whole", "--epochs=4")
    for key, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(out)[key], value)
    vitft("finetune", "--resume", "--out", out, "--epochs=1")  # fewer: there is nothing to do
    assert summary(out)["epochs_done"] == 4
    refused = vitft("finetune", "--resume", "--out", out, "--lr=1", code=2).stderr
    assert "was started with lr 0.002, not 1.0" in refused
    told = vitft("finetune", "--resume", "--out", tmp_path, code=2).stderr
    assert "there is no run to resume in" in told


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Return other images of red and green alone."""
    for i in range(12):
        for part in ("train", "test"):
            other = int(part == "test")
            paint(tmp_path / "more" / part / "red" / f"{i}.png", (180 + i, other, 0))
            paint(tmp_path / "more" / part / "green" / f"{i}.png", (other, 180 + i, 0))
    return tmp_path / "more"


@pytest.mark.parametrize("method", ["lora", "full", "linear"])
def test_an_adapter_goes_on_where_it_stood(
    method: str, vitft: Run, base: Path, folder: Path, more: Path, tmp_path: Path
) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    flags = ["--epochs=4", "--batch-size=8"]
    vitft("finetune", "--adapter", method, "--base", base, "--data", folder, "--out", first, *flags)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    # a rate of next to nothing: what it started from is what it ends with
    still = ["--from", first, "--epochs=1", "--lr=1e-12", "--keep=last"]
    vitft("finetune", *still, "--data", folder, "--out", again)
    for key, value in tensors(first, name).items():
        torch.testing.assert_close(tensors(again, name)[key], value, rtol=0, atol=1e-6)
    vitft("finetune", *still, "--data", more, "--out", other, "--resume")  # which is new
    vitft("finetune", *still, "--data", more, "--out", other, "--resume")
    found = tensors(other, name)
    heads = [key for key in found if "head" in key]
    assert all(len(found[key]) == 2 for key in heads)
    for key in found.keys() - {*heads}:
        torch.testing.assert_close(found[key], tensors(first, name)[key], rtol=0, atol=1e-6)
    model = ["--base", other] if method == "full" else ["--adapter", other]
    measured = json.loads(vitft("evaluate", *model, "--data", more, "--json").stdout)
    assert measured["test_accuracy"] == summary(other)["test_accuracy"]


def test_what_stands_cannot_be_given_again(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    flags = ["--adapter=lora", "--base", base, "--data", folder, "--epochs=1"]
    vitft("finetune", *flags, "--out", first)
    given = ["--from", first, "--data", folder, "--out", tmp_path / "x"]
    for flag, name in (("--rank=2", "rank"), ("--base=cifar10", "base"), ("--layers=1", "layers")):
        told = vitft("finetune", *given, flag, code=2).stderr
        assert f"--from goes on with the adapter as it is; leave out --{name}" in told
    told = vitft("finetune", *given[:-1], first, "--overwrite", code=2).stderr
    assert "holds the run to go on with; choose another --out" in told
    assert (first / "adapter_model.safetensors").is_file()
    shutil.rmtree(first)
    assert "there is no run to go on with" in vitft("finetune", *given, code=2).stderr


def test_folders_called_as_what_ships_are_known_as_folders(
    vitft: Run, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shapes").symlink_to(folder)
    Path("cifar10").symlink_to(base.parent)
    flags = ["--adapter=linear", "--data=shapes", "--base=cifar10", "--epochs=1", "--out=run"]
    told = vitft("finetune", *flags).stderr
    assert "shapes is taken as the folder here" in told
    for name in ("config.json", "summary.json"):
        facts = json.loads(Path("run", name).read_text())
        assert (facts["data"], facts["base"]) == ("./shapes", "./cifar10")
    vitft("finetune", *flags, "--resume", "--epochs=2")
    assert "which is not on the hub" in Path("run/README.md").read_text()
    config = json.loads(Path("run/config.json").read_text()) | {"data": "shapes", "base": "cifar10"}
    Path("run/config.json").write_text(json.dumps(config | {"epochs": 2.0}))  # of an older version
    vitft("finetune", "--resume", "--epochs=3", "--out=run")


@pytest.mark.parametrize(
    ("name", "value"), [("crop", ""), ("epochs", "many"), ("rank_pattern", [3]), ("log", "x")]
)
def test_an_option_of_another_type_is_named(
    name: str, value: object, vitft: Run, run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    told = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(told | {name: value}))
    (out / "state.safetensors").unlink()  # which tells that an option was edited
    for flags in (["finetune", "--resume", "--out", out], ["rerun", out]):
        assert f"Error: config.json: {name}: Expected" in vitft(*flags, code=2).stderr


def test_a_run_that_does_not_name_its_base_is_not_done_again(
    vitft: Run, run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    told = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(told | {"base": None}))
    assert "is broken: config.json lacks base" in vitft("rerun", out, code=2).stderr


@long
def test_what_goes_on_leaves_the_same_files(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=lora", "--base", base, "--data", folder, "--epochs=2", "--alpha=4"]
    for name in ("whole", "again"):
        vitft("finetune", *flags, "--out", tmp_path / name)
    (tmp_path / "again" / "adapter_model.safetensors").unlink()
    vitft("finetune", "--resume", "--out", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for options in ([], ["--alpha=16"]):  # of the default, a whole number
        out = tmp_path / f"default {len(options)}"
        vitft("finetune", *flags[:-1], *options, "--out", out)
        before = (out / "adapter_model.safetensors").read_bytes()
        vitft("finetune", "--resume", "--out", out)
        assert (out / "adapter_model.safetensors").read_bytes() == before


def test_what_python_calls_none_is_left_out() -> None:
    assert recalled({"adapter": "lora", "from_": None}) == {}
