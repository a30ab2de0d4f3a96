"""`--unfreeze N` trains the last blocks whole, beside an adapter in the others or alone."""

from pathlib import Path

import pytest

from tests.conftest import Run, summary
from vitft import load_model


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
