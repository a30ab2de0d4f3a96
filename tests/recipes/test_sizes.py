"""`--sizes`: smaller images first, in every command that trains."""

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from tests.shared import TINY_FLAGS, Run
from vitft.model.vit import VisionTransformer

COMMANDS = {
    "pretrain": TINY_FLAGS,
    "finetune": ["--adapter=lora", "--layers=1"],
    "sweep": ["--adapter=lora", "--lr=1e-3,1e-2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_epochs_see_smaller_images(
    vitft: Run,
    folder: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    plain, n_seen = VisionTransformer.embed, Counter[int]()

    def embed(self: VisionTransformer, images: Tensor) -> Tensor:
        if self.training and len(images) > 2:  # two are looked at before training
            n_seen[images.shape[-1]] += len(images)
        return plain(self, images)

    monkeypatch.setattr(VisionTransformer, "embed", embed)
    flags = ["--data", folder, "--out", tmp_path / "run", "--batch-size=54", *COMMANDS[command]]
    if command != "pretrain":
        flags += ["--base", base]
    vitft(command, *flags, "--epochs=3", "--sizes=4:0.67")
    assert [*n_seen] == [4, 8]
    assert n_seen[4] == 2 * n_seen[8]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ("16", "sizes=16 is not SIZE:SHARE,SIZE:SHARE, e.g. 16:0.6,24:0.3"),
        ("12:0.5", "sizes: 12 is more than the full 8 pixels; choose less"),
        ("6:0.5", "sizes: image_size=6 is not a positive multiple of patch_size=4; try 8"),
        ("1:0.5", "sizes: image_size=1 is not a positive multiple of patch_size=4; try 4"),
        ("4:0.6,8:0.6", "shares are in 0..1 and add up to 1 at most"),
        ("4:-0.5", "shares are in 0..1 and add up to 1 at most"),
        ("4:nan", "shares are in 0..1 and add up to 1 at most"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_read(
    vitft: Run, base: Path, tmp_path: Path, command: str, sizes: str, told: str
) -> None:
    flags = ["--data", "no folder", "--out", tmp_path / "run", *COMMANDS[command]]
    if command != "pretrain":
        flags += ["--base", base]
    assert told in vitft(command, *flags, f"--sizes={sizes}", code=2).stderr


def test_features_of_one_size_are_not_kept_for_another(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--out", tmp_path / "run"]
    flags += ["--epochs=2", "--sizes=4:0.5"]
    assert "computed once" not in vitft("finetune", *flags).stderr
    done = vitft("finetune", *flags, "--overwrite", "--cache-features", code=2)
    assert "would change the result: --sizes changes the images; leave it out" in done.stderr
