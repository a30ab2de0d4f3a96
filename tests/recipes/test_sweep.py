"""A sweep: every adapter trains as it does alone, to 1e-5 in float64 and closer."""

import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import recipes.sweep
from recipes.sweep import best_of
from recipes.sweeping.members import Member
from tests.shared import TINY_FLAGS, Run, long, paint, some, summary
from vitft import VisionTransformer, load_model
from vitft.training.step import Step


@pytest.fixture(scope="module")
def base(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "base"
    flags = [*TINY_FLAGS, "--epochs=1", "--batch-size=8"]
    vitft("pretrain", "--data", folder, "--out", out, *flags)
    return out


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every base be loaded in float64."""
    for module in ("recipes.sweep", "recipes.finetune"):
        monkeypatch.setattr(f"{module}.load_model", lambda path: load_model(path).double())


FLAGS = ["--epochs=2", "--batch-size=8", "--shift=1", "--flip", "--save-seconds=0"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("method", "own"),
    some(
        [("lora", ["--lr-ratio=4"]), *((m, []) for m in ("dora", "vera", "ia3", "ssf", "norm"))], 6
    ),
)
def test_every_adapter_trains_as_it_does_alone(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, method: str, own: list[str]
) -> None:
    torch.set_num_threads(2 if method == "ia3" else 1)  # passes side by side, or in turn
    ranks = ["--rank=1,3"] if method in ("lora", "dora", "vera") else []
    common = [f"--adapter={method}", "--base", base, "--data", folder, *FLAGS, *own]
    vitft("sweep", *common, *ranks, "--lr=1e-2,3e-2", "--seeds=2", "--out", tmp_path / "sweep")
    last = f"{'rank=3,' if ranks else ''}lr=0.03,seed=1"
    alone = ["--rank=3"] if ranks else []
    vitft("finetune", *common, *alone, "--lr=3e-2", "--seed=1", "--out", tmp_path / "alone")
    found, expected = tensors(tmp_path / "sweep" / last), tensors(tmp_path / "alone")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7)
    rows = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "sweep" / last, tmp_path / "alone")
    ]
    for one, two in zip(*rows, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-6)
        assert one["val_accuracy"] == two["val_accuracy"]


def sweep(vitft: Run, folder: Path, base: Path, out: Path, *flags: object, code: int = 0) -> Any:
    common = ["--adapter=lora", "--base", base, "--data", folder, *FLAGS]
    return vitft("sweep", *common, "--out", out, *flags, code=code)


@pytest.mark.parametrize(
    ("flags", "why"),
    some(
        [
            (["--adapter=full"], "each trains a base of its own"),
            (["--adapter=loha", "--rank=2,3"], "LoHaLinear cannot be stacked"),
            (["--adapter=vpt"], "'blocks.0' is a Block"),
            (["--dropout=0.1"], "dropout draws other numbers together than alone"),
        ],
        3,
    ),
)
def test_what_cannot_train_together_trains_one_after_the_other(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, flags: list[str], why: str
) -> None:
    done = sweep(vitft, folder, base, tmp_path / "sweep", *flags, "--lr=1e-3,3e-3")
    assert f"one after the other: {why}" in done.stderr
    common = ["--adapter=lora", "--base", base, "--data", folder, *FLAGS]
    alone = [flag for flag in flags if "rank" not in flag]
    chosen = f"{'rank=2,' if alone != flags else ''}lr=0.003,seed=0"
    alone += ["--rank=2"] if alone != flags else []
    vitft("finetune", *common, *alone, "--lr=3e-3", "--out", tmp_path / "alone")
    one, two = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "sweep" / chosen, tmp_path / "alone")
    )
    assert [row["train_loss"] for row in one] == [row["train_loss"] for row in two]


def test_a_sweep_picks_by_validation_and_writes_all_it_promises(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--rank=1,2", "--lr=1e-3,3e-2", "--seeds=2", "--layers=1", "--together=3"]
    done = sweep(vitft, folder, base, tmp_path, *flags)
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert len(told["rows"]) == 4
    assert told["best"]["val_accuracy"] == max(row["val_accuracy"] for row in told["rows"])
    assert [row for row in told["rows"] if "test_accuracy" in row] == [told["best"]]
    folders = [Path(name) for row in told["rows"] for name in row["folders"]]
    assert {path.name for path in folders} == {
        f"rank={rank},lr={lr},seed={seed}"
        for rank in (1, 2)
        for lr in (0.001, 0.03)
        for seed in (0, 1)
    }
    for path in folders:
        assert (path / "adapter_config.json").exists()
        tested = json.loads((path / "summary.json").read_text())["test_accuracy"] is not None
        assert tested == (str(path) in told["best"]["folders"])
    assert f"{told['best']['test_accuracy']:.2%}" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "<table>" in page
    best = told["best"]["folders"][0]
    measured = vitft("evaluate", "--base", base, "--adapter", best, "--data", folder, "--json")
    summary = json.loads(Path(best, "summary.json").read_text())
    assert json.loads(measured.stdout)["test_accuracy"] == summary["test_accuracy"]


def test_cached_features_change_nothing(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    plain = ["--no-flip", "--shift=0", "--layers=1", "--rank=1,2"]
    for name in ("--cache-features", "--no-cache-features"):
        sweep(vitft, folder, base, tmp_path / name, *plain, name)
    for path in ("rank=1,seed=0", "rank=2,seed=0"):
        one, two = (
            tensors(tmp_path / name / path) for name in ("--cache-features", "--no-cache-features")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)


@long
@pytest.mark.parametrize(
    ("flags", "stop_at", "kept", "last"),
    [
        (["--rank=1,2,3"], 8, [f"rank={rank},seed=0" for rank in (1, 2, 3)], ["rank=3,seed=0"]),
        # the one that fails begins anew, and takes no place in another's group
        (
            ["--lr=1e30,1e-3,2e-3,3e-3,4e-3,5e-3", "--clip=0"],
            18,
            [f"lr={lr},seed=0" for lr in (0.001, 0.002, 0.003, 0.004, 0.005)],
            ["lr=0.004,seed=0", "lr=0.005,seed=0"],
        ),
    ],
)
def test_a_stopped_sweep_goes_on_as_if_it_had_not(
    flags: list[str],
    stop_at: int,
    kept: list[str],
    last: list[str],
    vitft: Run,
    folder: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [*flags, "--together=2"]
    sweep(vitft, folder, base, tmp_path / "whole", *flags)
    plain, n_steps = Step.__call__, iter(range(100))

    def step(self: Step, *arguments: Any) -> None:
        plain(self, *arguments)
        if next(n_steps) == stop_at:  # a chunk takes 14
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        stopped = sweep(vitft, folder, base, tmp_path / "cut", *flags, code=130)
    assert "--resume goes on" in stopped.stderr
    together, plain_train = [], recipes.sweep.train_together

    def noted(base: VisionTransformer, members: Sequence[Member], **begin: Any) -> None:
        together.append([member.folder.name for member in members])
        plain_train(base, members, **begin)

    monkeypatch.setattr(recipes.sweep, "train_together", noted)
    sweep(vitft, folder, base, tmp_path / "cut", *flags, "--resume")
    assert together[-1] == last
    for member in kept:
        one, two = (tensors(tmp_path / name / member) for name in ("whole", "cut"))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank=2,x"], "--rank 'x' is no number"),
        (["--rank=2,0"], "rank=0 is not a positive integer"),
        (["--seeds=0"], "seeds=0 is not positive"),
        (["--together=0"], "together=0 is not positive"),
        (["--val-fraction=0"], "a sweep picks by validation; leave out --val-fraction 0"),
        (["--lr=1e-3,0.001"], "--lr has a value twice: [0.001, 0.001]"),
        (["--compile"], "a sweep computes its adapters in one pass; leave out --compile"),
        (["--auto-batch"], "a sweep computes its adapters in one pass; leave out --auto-batch"),
        (["--from=x"], "a sweep starts new adapters; leave out --from"),
        (["--adapter=boft"], "unknown adapter 'boft'; choose from lora"),
        (["--width=3"], "--width means nothing to --adapter lora"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    done = sweep(vitft, folder, base, tmp_path / "out", *flags, code=2)
    assert message in done.stderr
    assert not (tmp_path / "out" / "sweep.json").exists()


@long
@pytest.mark.usefixtures("_float64")
def test_a_rate_that_diverges_takes_no_other_with_it(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--lr=1e-3,1e30", "--clip=0"]
    done = sweep(vitft, folder, base, tmp_path / "out", *flags)
    assert "lr=1e+30,seed=0 failed: the gradient is not finite" in done.stderr
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["val_accuracy"] is None for row in told["rows"]] == [False, True]
    sweep(vitft, folder, base, tmp_path / "alone", "--lr=1e-3", "--clip=0")
    one, two = tensors(tmp_path / "out/lr=0.001,seed=0"), tensors(tmp_path / "alone/seed=0")
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=0, atol=1e-7)
    done = sweep(vitft, folder, base, tmp_path / "none", "--lr=1e30", "--clip=0", code=2)
    assert "the gradient is not finite" in done.stderr
    before = told["best"]
    sweep(vitft, folder, base, tmp_path / "out", *flags, "--resume")
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert told["best"] == before
    assert "the gradient is not finite" in told["rows"][1]["failed"]


@long
def test_seeds_that_split_otherwise_train_all_the_same(
    vitft: Run, base: Path, tmp_path: Path
) -> None:
    for i in range(64):  # tracks of other lengths leave other numbers of images to train on
        name = f"{math.isqrt(i):03}_{i}.png"
        paint(tmp_path / f"data/train/{'ab'[i % 2]}/{name}", (6 * i, 100 * (i % 2), 0))
        paint(tmp_path / f"data/test/{'ab'[i % 2]}/{name}", (6 * i, 100 * (i % 2), 0))
    flags = ["--rank=1,2", "--seeds=3", "--batch-size=4", "--val-fraction=0.2"]
    done = sweep(vitft, tmp_path / "data", base, tmp_path / "out", *flags)
    folders = [path.parent for path in (tmp_path / "out").glob("*/summary.json")]
    sizes = {summary(path)["seed"]: summary(path)["n_train"] for path in folders}
    assert len(folders) == 6
    assert len({size // 4 for size in sizes.values()}) > 1
    assert "vitft predict --base" in done.stdout


def test_a_sweep_needs_images_to_validate_by(vitft: Run, base: Path, tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        paint(tmp_path / "data" / name, (9, 9, 9))
    done = sweep(vitft, tmp_path / "data", base, tmp_path / "out", "--rank=1,2", code=2)
    assert "picks by validation, but no class has two images" in done.stderr


def test_of_those_equal_in_accuracy_the_lowest_loss_is_best() -> None:
    rows = [{"val_accuracy": 0.5, "val_loss": loss, "failed": None} for loss in (0.9, 0.7, 0.8)]
    failed = {"val_accuracy": None, "val_loss": None, "failed": "the loss is nan"}
    assert best_of([failed, *rows]) is rows[1]
    assert best_of([failed]) is None


def test_a_sweep_that_grows_keeps_what_is_done(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    sweep(vitft, folder, base, tmp_path, "--rank=1,2")
    before = tensors(tmp_path / "rank=1,seed=0")
    lines = (tmp_path / "rank=1,seed=0" / "metrics.jsonl").read_text()
    sweep(vitft, folder, base, tmp_path, "--rank=1,2,3", "--resume")
    assert (tmp_path / "rank=1,seed=0" / "metrics.jsonl").read_text() == lines
    after = tensors(tmp_path / "rank=1,seed=0")
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["rows"]) == 3


def test_a_sweep_replaces_neither_a_run_nor_its_base(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    sweep(vitft, folder, base, tmp_path / "a", "--adapter=full")
    done = sweep(vitft, folder, base, tmp_path / "a", "--rank=2,3", code=2)
    assert "holds sweep.json already; use --resume, --overwrite or another --out" in done.stderr
    own = tmp_path / "a" / "seed=0"
    done = sweep(vitft, folder, own, tmp_path / "a", "--overwrite", code=2)
    assert "holds the base, which the run would replace" in done.stderr
    assert load_model(own)


def test_a_sweep_that_replaces_another_removes_its_result_first(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "report.html").touch()
    monkeypatch.setattr("recipes.sweeping.members._train", stop)
    sweep(vitft, folder, base, tmp_path, "--rank=2,3", "--overwrite", code=130)
    assert not [*tmp_path.glob("*.*")]


def test_a_sweep_in_bfloat16_is_near_each_alone(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--precision=bf16", "--epochs=1", "--no-flip", "--shift=0"]
    sweep(vitft, folder, base, tmp_path / "both", "--rank=2,3", *flags)
    sweep(vitft, folder, base, tmp_path / "alone", "--rank=3", *flags)
    one, two = (tensors(tmp_path / n) for n in ("both/rank=3,seed=0", "alone/seed=0"))
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=0.05, atol=0.02)
