"""`--unfreeze N` trains the last blocks whole, beside an adapter in the others or alone."""

import json
from pathlib import Path

import pytest

from recipes.shared.adapt import at_full_rate
from recipes.shared.finetuning import FinetuneOptions
from recipes.shared.methods import default_lr
from tests.shared import TINY, Run, summary
from vitft import VisionTransformer, ViTConfig, load_model
from vitft.optimizers.build import build_optimizers
from vitft.training.plan import Plan


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_the_last_blocks_train_whole(
    method: str, vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter", method, "--base", base, "--data", folder, "--epochs=1", "--unfreeze=1"]
    vitft("finetune", *flags, "--out", tmp_path / "out")
    model = load_model(base)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    last = sum(n for name, n in sizes.items() if name.startswith("blocks.1."))
    head = sum(n for name, n in sizes.items() if name.startswith("head."))
    norm = sum(n for name, n in sizes.items() if name.startswith("norm."))
    told = summary(tmp_path / "out")
    if method == "linear":
        assert told["n_trainable"] == last + head + norm
    else:  # rank 8 on the six linears of block 0: 4 of 16 x 16, 2 of 16 x 32
        assert told["n_trainable"] == last + head + 8 * (4 * 32 + 2 * 48)
    changes = json.loads((tmp_path / "out/report.json").read_text())["changes"]
    whole = {change["layer"] for change in changes if change["size"] > 0}
    linears = {f"blocks.1.{name}" for name in ("attn.wq", "attn.wo", "ffn.w1", "norm1")}
    assert linears <= whole
    assert ("blocks.0.attn.wq" in whole) is (method == "lora")
    assert ("norm" in whole) is (method == "linear")
    flags = ["--base", base, "--adapter", tmp_path / "out", "--data", folder]
    assert f"{told['test_accuracy']:.2%} of 12" in vitft("evaluate", *flags).stdout


@pytest.mark.parametrize(
    ("method", "n", "told"),
    [
        ("full", 1, "--adapter full trains every block; leave out --unfreeze"),
        ("lora", 3, "unfreeze=3 is not in 0 <= unfreeze <= 2, the base's blocks"),
        ("lora", -1, "unfreeze=-1 is not in"),
    ],
)
def test_what_cannot_be_unfrozen_is_refused(
    method: str, n: int, told: str, vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter", method, "--base", base, "--data", folder, "--out", tmp_path / "x"]
    assert told in vitft("finetune", *flags, f"--unfreeze={n}", code=2).stderr


@pytest.mark.parametrize(("lr", "rate"), [(1e-2, None), (1e-7, 1e-7)])
@pytest.mark.parametrize("method", ["linear", "lora"])
def test_whole_blocks_train_at_the_rate_of_full_fine_tuning(
    method: str, lr: float, rate: float | None
) -> None:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=3))
    options = FinetuneOptions(adapter=method, base="cifar10", data="x", out="y", unfreeze=1)
    plan = Plan(epochs=1, batch_size=8, lr=lr, weight_decay=0.0, lr_factors={"weight": 0.5})
    plan = at_full_rate(plan, model, options)
    made = build_optimizers(
        model, name="adamw", lr=lr, weight_decay=0.0, lr_factors=plan.lr_factors
    )
    found = {
        id(p): group["lr_factor"] for o in made for group in o.param_groups for p in group["params"]
    }
    rate = default_lr("full", known_backbone=False) if rate is None else rate
    for name, parameter in model.named_parameters():
        if method == "lora" and name.startswith("norm."):
            continue  # does not train
        whole = name.startswith(("blocks.1.", "norm."))
        expected = (rate if whole else lr) * (0.5 if name.endswith("weight") else 1)
        assert lr * found[id(parameter)] == pytest.approx(expected), name
