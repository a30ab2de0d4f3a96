import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

import adapters
from recipes.shared.options import TrainOptions, make_plan, pick_bf16, pick_compile, pick_device
from tests.shared import Run, some, summary
from vitft import load_model

METHODS = [*adapters.METHODS, "linear", "full"]
SUMMARY = {
    *("test_accuracy", "test_loss", "n_parameters", "n_trainable", "images_per_second"),
    *("seconds", "device", "data", "seed", "versions"),
}


def test_pretrain_leaves_what_the_contract_says(base: Path) -> None:
    out = base.parent
    files = {"config.json", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
    files |= {"state.safetensors", "report.json", "README.md"}
    assert {path.name for path in out.iterdir()} == files
    assert summary(out).keys() >= SUMMARY
    assert summary(out)["test_accuracy"] > 0.9
    assert json.loads((out / "config.json").read_text())["dim"] == 16
    assert "<svg" in (out / "report.html").read_text()
    model = load_model(base)
    assert model.classes == ("blue", "green", "red")
    assert model.mean != (0.5, 0.5, 0.5)


@pytest.mark.parametrize("method", some(METHODS, 3))
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
    beside = ("linear", "vpt", "adaptformer", "adapterplus")  # these change no weight of the base
    assert bool(json.loads((out / "report.json").read_text())["changes"]) is (method not in beside)


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
    assert all(name in text for name in ("shapes", "symbols", "cifar10", "FOLDER", "TABLE"))


def test_devices_and_precisions_are_checked() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_bf16("bf16", torch.device("cpu"))
    assert not pick_bf16("fp32", torch.device("cpu"))
    for name in ("gpu", "cuda:one", "cpu:"):
        with pytest.raises(ValueError, match=f"unknown device '{name}'; choose from auto"):
            pick_device(name)
    for name in ("cpu:1", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(ValueError, match=f"device {name} is not there"):
            pick_device(name)
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
        (True, "cpu", 1, 0, "cc", True),
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
    monkeypatch.setattr("recipes.shared.options.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: tool)
    options = TrainOptions(data="x", out="y", epochs=1, compile=asked)
    plan = replace(make_plan(options, torch.device("cpu")), n_cached=n_cached)
    assert pick_compile(options, plan, n_train, torch.device(device)) is expected
    if asked:
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
            pick_compile(options, plan, n_train, torch.device(device))


def test_odd_names_of_pictures_cost_no_other_answer(
    vitft: Run, run: Path, folder: Path, tmp_path: Path
) -> None:
    picture = folder / "test" / "red" / "000.png"
    odd = shutil.copy(picture, tmp_path / os.fsdecode(b"\xff.png"))
    long_name, out = tmp_path / ("x" * 300 + ".png"), tmp_path / "answers.csv"
    told = vitft("predict", "--adapter", run, long_name, odd, picture, "--out", out, code=2).stderr
    assert "1 of 3 images are missing or broken" in told
    text = out.read_text()
    assert f"{picture},,1,red" in text
    assert f"{tmp_path}/\\udcff.png,,1,red" in text


def test_predict_asks_several_adapters_in_one_pass(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.shared.classifier.MAX_ROWS", 4)
    monkeypatch.setattr("vitft.devices.cores.n_parts", lambda device, n_images: 3)
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
