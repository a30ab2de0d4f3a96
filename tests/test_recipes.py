import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapters
from recipes.options import TrainOptions, make_plan, pick_bf16, pick_compile, pick_device
from recipes.runs import locked
from tests.conftest import TINY_FLAGS, Run, paint
from vitft import load_model, save_model
from vitft.files import read_tensors

METHODS = [*adapters.METHODS, "linear", "full"]
SUMMARY = {
    *("test_accuracy", "test_loss", "n_parameters", "n_trainable", "images_per_second"),
    *("seconds", "device", "data", "seed", "versions"),
}


@pytest.fixture(scope="module")
def base(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base that tells red, green and blue apart."""
    out = tmp_path_factory.mktemp("recipes") / "base"
    flags = ["--epochs=12", "--batch-size=8", "--lr=3e-3", *TINY_FLAGS]
    vitft("pretrain", "--data", folder, "--out", out, *flags)
    return out / "model.safetensors"


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def test_pretrain_leaves_what_the_contract_says(base: Path) -> None:
    out = base.parent
    files = {"config.json", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
    assert {path.name for path in out.iterdir()} == files | {"state.safetensors"}
    assert summary(out).keys() >= SUMMARY
    assert summary(out)["test_accuracy"] > 0.9
    assert json.loads((out / "config.json").read_text())["dim"] == 16
    assert "<svg" in (out / "report.html").read_text()
    model = load_model(base)
    assert model.classes == ("blue", "green", "red")
    assert model.mean != (0.5, 0.5, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_finetune_trains_saves_and_reloads(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / f"a run of {method}"
    rank = ["--rank=2"] if method in ("lora", "dora", "vera", "loha", "lokr") else []
    common = ["--data", folder, "--base", base]
    done = vitft("finetune", f"--adapter={method}", *common, "--out", out, "--epochs=2", *rank)
    told = summary(out)
    assert told.keys() >= SUMMARY
    assert (told["n_trainable"] == told["n_parameters"]) is (method == "full")
    assert f"{told['test_accuracy']:.2%}" in done.stdout
    assert f"{told['n_trainable']:,} of {told['n_parameters']:,}" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("evaluate it"))
    again = json.loads(vitft(*shlex.split(command)[3:], "--json").stdout)
    assert again["test_accuracy"] == told["test_accuracy"]
    assert again["test_loss"] == pytest.approx(told["test_loss"], abs=1e-6)
    files = {path.name for path in out.iterdir()}
    assert ("model.safetensors" in files) is (method == "full")
    assert ("adapter_config.json" in files) is (method != "full")


def test_the_options_of_methods_reach_them(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--use-rslora", "--lr-ratio=4", "--init=pissa", "--rank-pattern=w1=3,wq=1"]
    flags += ["--targets", r"wq,.*\.1\.ffn\.w.", "--epochs=1", "--rank=2"]
    vitft("finetune", "--adapter=lora", "--data", folder, "--base", base, "--out", tmp_path, *flags)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"w1": 6, "wq": 2}  # doubled by PiSSA
    assert written["use_rslora"]
    assert written["target_modules"][-2:] == ["blocks.1.ffn.w1", "blocks.1.ffn.w2"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["lr_ratio"], config["alpha"], config["width"]) == (4, 16, None)
    done = vitft("finetune", "--help").stdout
    assert all(f"  {method} " in done for method in METHODS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter=ia3", "--rank=2"], "--rank means nothing to --adapter ia3; leave it out"),
        (["--adapter=lora", "--width=2"], "--width means nothing to --adapter lora"),
        (["--adapter=lora", "--rank-pattern=w1"], "'w1' is not NAME=VALUE,NAME=VALUE"),
        (["--adapter=lora", "--rank-pattern=w9=2"], "pattern 'w9' matches none of the targets"),
        (["--adapter=lora", "--init=zeros"], "init='zeros' is unknown; choose from kaiming, gau"),
        (["--adapter=vpt", "--targets=wq"], "'blocks.0.attn.wq' is a Linear with weights of its"),
    ],
)
def test_options_of_methods_that_do_not_fit_are_refused(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    common = ["--data", folder, "--base", base, "--out", tmp_path / "a"]
    assert message in vitft("finetune", *common, *flags, code=2).stderr


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_gives_the_same_logits(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, method: str
) -> None:
    flags = ["--epochs=1", "--rank=3", "--alpha=5", "--targets=wq,ffn.w1", "--lr=0.03"]
    vitft(
        "finetune",
        f"--adapter={method}",
        "--base",
        base,
        "--data",
        folder,
        "--out",
        tmp_path / "a",
        *flags,
    )
    images = torch.randn(4, 3, 8, 8)
    ours = adapters.load_adapter(load_model(base), tmp_path / "a")(images)
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "a")
    torch.testing.assert_close(theirs(images), ours, rtol=0, atol=1e-5)
    assert (ours - load_model(base)(images)).abs().max() > 1e-3


def test_an_adapter_that_peft_saved_loads(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["wq", "w2"], modules_to_save=["head"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(load_model(base), config).eval()
    torch.nn.init.normal_(theirs.base_model.model.head.modules_to_save.default.weight)
    theirs.save_pretrained(tmp_path)
    images = torch.randn(4, 3, 8, 8)
    ours = adapters.load_adapter(load_model(base), tmp_path)(images)
    torch.testing.assert_close(ours, theirs(images), rtol=0, atol=1e-5)
    assert (ours - load_model(base)(images)).abs().max() > 1e-3


def test_predict_and_merge_agree_with_the_adapter(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "lora", tmp_path / "merged.safetensors"
    vitft(
        "finetune",
        "--adapter=lora",
        "--base",
        base,
        "--data",
        folder,
        "--out",
        adapter,
        "--epochs=8",
        "--rank=2",
    )
    told = vitft("merge", "--base", base, "--adapter", adapter, "--out", merged).stdout
    difference = float(told.split("of noise")[1].split()[0])
    assert difference < 1e-4
    image = folder / "test" / "red" / "001.png"
    one = json.loads(vitft("predict", "--base", base, "--adapter", adapter, image, "--json").stdout)
    two = json.loads(vitft("predict", "--base", merged, image, "--json", "--top=9").stdout)
    assert next(iter(one[0]["classes"])) == next(iter(two[0]["classes"])) == "red"
    assert one[0]["classes"] == pytest.approx(two[0]["classes"], abs=1e-5)
    assert sum(two[0]["classes"].values()) == pytest.approx(1)
    text = vitft("predict", "--base", merged, image, image, "--top=1").stdout.splitlines()
    assert text[0] == text[1] == f"{image}  red {two[0]['classes']['red']:.1%}"


def test_inspect_tells_what_a_file_holds(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    vitft(
        "finetune",
        "--adapter=dora",
        "--base",
        base,
        "--data",
        folder,
        "--out",
        tmp_path / "d",
        "--epochs=1",
    )
    of_base = json.loads(vitft("inspect", base, "--json").stdout)
    of_adapter = json.loads(vitft("inspect", tmp_path / "d", "--json").stdout)
    assert of_base["n_parameters"] == sum(p.numel() for p in load_model(base).parameters())
    assert of_base["classes"] == of_adapter["classes"] == ["blue", "green", "red"]
    assert of_base["fingerprint"] == of_adapter["base_fingerprint"]
    assert of_adapter["config"]["use_dora"] is True
    assert json.loads(vitft("inspect", base.parent, "--json").stdout) == of_base


def test_data_lists_every_named_set(vitft: Run) -> None:
    text = vitft("data").stdout
    assert all(name in text for name in ("shapes", "symbols", "cifar10", "FOLDER/train/CLASS"))


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vitft", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(state: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a state in the middle of an epoch is saved."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if state.exists() and read_tensors(state)[1]["step"] > 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step was saved: {process.communicate()[1]}")


KILLED = ["--data=shapes", "--limit=320", "--epochs=2", "--batch-size=8", "--dropout=0.1"]
KILLED += ["--save-seconds=1e-9", "--val-fraction=0.02", *TINY_FLAGS]


@pytest.fixture(scope="module")
def whole(vitft: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("killed") / "whole"
    vitft("pretrain", *KILLED, "--out", out)
    return out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)]
)
def test_a_killed_run_resumes_bit_for_bit(
    vitft: Run, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    process = start("pretrain", *KILLED, "--out", tmp_path)
    wait_for_step(tmp_path / "state.safetensors", process)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == code, told
    assert not (tmp_path / "model.safetensors").exists()
    assert code == -9 or "the same command with --resume goes on" in told
    vitft("pretrain", *KILLED, "--out", tmp_path, "--resume")
    model, expected = (folder / "model.safetensors" for folder in (tmp_path, whole))
    assert model.read_bytes() == expected.read_bytes()
    assert summary(tmp_path)["test_loss"] == summary(whole)["test_loss"]


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
    other = load_model(mine)
    torch.nn.init.zeros_(other.norm.bias)
    save_model(other, mine)
    assert "another base" in vitft("finetune", *flags, "--epochs=1", "--resume", code=2).stderr


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


def test_devices_and_precisions_are_checked() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_bf16("bf16", torch.device("cpu"))
    assert not pick_bf16("fp32", torch.device("cpu"))
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose from auto"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        pick_bf16("half", torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "device", "n_train", "n_cached", "tool", "expected"),
    [
        (None, "cpu", 10**9, 0, "cc", False),
        (None, "cuda", 1_000, 0, "cc", False),
        (None, "cuda", 5_000_000, 0, "cc", True),
        (None, "cuda", 5_000_000, 0, None, False),
        (None, "cuda", 5_000_000, 3, "cc", False),
        (True, "cpu", 1, 0, None, True),
        (False, "cuda", 10**9, 0, "cc", False),
    ],
)
def test_the_model_is_compiled_where_it_pays(
    asked: bool | None,
    device: str,
    n_train: int,
    n_cached: int,
    tool: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recipes.options.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: tool)
    options = TrainOptions(data="x", out="y", epochs=1, compile=asked)
    plan = replace(make_plan(options, torch.device("cpu")), n_cached=n_cached)
    assert pick_compile(options, plan, n_train, torch.device(device)) is expected


def test_predict_asks_several_adapters_in_one_pass(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.predict.ROWS", 4)
    monkeypatch.setattr("vitft.cores.n_parts", lambda model, n_images: 3)
    common = ["--data", folder, "--base", base, "--epochs=1"]
    vitft("finetune", "--adapter=lora", *common, "--rank=2", "--out", tmp_path / "a")
    vitft("finetune", "--adapter=dora", *common, "--rank=3", "--out", tmp_path / "b,c")
    images = [next((folder / "test" / name).iterdir()) for name in ("red", "green", "blue")]
    image = images[0]
    both = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b,c"]
    told = json.loads(vitft("predict", "--base", base, *both, *images, "--json").stdout)
    assert [row["image"] for row in told] == [str(path) for path in images]
    for name in ("a", "b,c"):
        adapter = tmp_path / name
        alone = vitft("predict", "--base", base, "--adapter", adapter, *images, "--json").stdout
        for row, expected in zip(told, json.loads(alone), strict=True):
            assert row["adapters"][str(adapter)] == pytest.approx(expected["classes"], abs=1e-6)
    lines = vitft("predict", "--base", base, *both, image, "--top=1").stdout.splitlines()
    assert [line.split("  ")[1] for line in lines] == [str(tmp_path / "a"), str(tmp_path / "b,c")]
    vitft("finetune", "--adapter=loha", *common, "--out", tmp_path / "loha")
    failed = vitft("predict", "--base", base, *both, "--adapter", tmp_path / "loha", image, code=2)
    assert "LoHaLinear cannot be stacked in a bank; load it alone" in failed.stderr
