"""Which modules the numbers of blocks choose."""

import copy
from pathlib import Path

import pytest
from torch import nn

from adapters import LoRAConfig, inject, load_adapter, save_adapter
from adapters.layers import AdapterLinear
from adapters.targets import matching
from tests.adapters.toy import config, every_kind, toy


@every_kind
def test_layers_choose_among_the_targets(kind: str) -> None:
    wanted = [target.removeprefix("blocks.1.") for target in config(kind).targets]
    model = inject(toy(), config(kind, targets=wanted, layers=(1,)))
    found = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.requires_grad}
    assert found == {name for name in matching(toy(), wanted, "target") if "blocks.1" in name}


def test_the_number_that_counts_tells_blocks_apart() -> None:
    def names(model: nn.Module, target: str, layer: int) -> list[str]:
        config = LoRAConfig(targets=(target,), layers=iter([layer]), rank=2)
        adapted = inject(model, config).named_modules()
        return [name for name, module in adapted if isinstance(module, AdapterLinear)]

    assert names(nn.Sequential(nn.Identity(), toy()), "wq", 0) == ["1.blocks.0.attn.wq"]
    like_torchvision = nn.ModuleDict(
        {f"encoder_layer_{i}": nn.Sequential(nn.Linear(4, 4)) for i in range(3)}
    )
    assert names(like_torchvision, "0", 2) == ["encoder_layer_2.0"]


def test_a_target_outside_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target 'embed' is in none of the layers \[1\]"):
        inject(toy(), LoRAConfig(targets=("wq", "embed"), layers=(1,)))
    with pytest.raises(ValueError, match="inject the config first"):
        LoRAConfig(targets=("wq",), layers=(1,)).to_peft()


def test_layers_whose_names_say_more_than_they_mean_are_refused() -> None:
    wq = nn.ModuleDict({"wq": nn.Linear(3, 3)})
    model = nn.ModuleDict({"0": wq, "1": copy.deepcopy(wq), "x": nn.ModuleDict({"1": wq})})
    model["x"] = nn.ModuleDict({"0": nn.ModuleDict({"1": copy.deepcopy(wq)})})
    with pytest.raises(ValueError, match="'x.0.1.wq' ends in the name of a target"):
        inject(model, LoRAConfig(targets=("wq",), layers=(1,), rank=2))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 2), "layer 2 has no target; there are: 0, 1"),
        (1, r"layers=1 must be numbers of blocks, such as \(4, 5\)"),
        (("1",), r"layers=\('1',\) must be numbers"),
        ((-1,), r"layers=\(-1,\) must be numbers"),
        (None, "layers=None must be numbers"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject(toy(), LoRAConfig(targets=("wq",), layers=layers))


def test_a_target_can_be_a_pattern_for_a_whole_name() -> None:
    def names(*targets: str) -> list[str]:
        model = inject(toy(), LoRAConfig(targets=targets, rank=2))
        return [name for name, m in model.named_modules() if isinstance(m, AdapterLinear)]

    assert names(r"blocks\.1\..*w[qv]") == ["blocks.1.attn.wq", "blocks.1.attn.wv"]
    assert names(r".*\.w.", "embed")[0] == "embed"
    with pytest.raises(ValueError, match=r"'\*wq' is no regular expression"):
        names("*wq")
    with pytest.raises(
        ValueError, match="'blocks.0.attn.wq' lies inside 'blocks.0', which is a tar"
    ):
        inject(toy(), config("vpt", targets=("blocks.0", "wq")))


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="pattern 'w1' matches none of the targets"):
        inject(toy(), config("lora", rank_pattern={"w1": 2}))


def test_patterns_choose_ranks_and_alphas(tmp_path: Path) -> None:
    ranks = {r"0\.attn.wq": 2, r"blocks\.0\..*": 4, r".*1\..*": 3}  # the first that matches counts
    model = inject(toy(), config("patterns", rank_pattern=ranks))
    save_adapter(model, tmp_path)
    model = load_adapter(toy(), tmp_path, train=True)
    ranks = {n: len(p) for n, p in model.named_parameters() if n.endswith("lora_a")}
    assert ranks == {
        "blocks.0.attn.wq.lora_a": 2,
        "blocks.0.attn.wv.lora_a": 4,
        "blocks.1.attn.wq.lora_a": 3,
        "blocks.1.attn.wv.lora_a": 3,
        "blocks.1.ffn.0.lora_a": 3,
    }
    assert model.blocks[0].attn.wv.scale == 5 / 4
    assert model.blocks[1].attn.wv.scale == 5 / 3
    assert model.blocks[1].attn.wq.scale == 16 / 3
