"""Which modules the numbers of blocks choose."""

import copy

import pytest
from adapters_toy import toy
from torch import nn

from adapters import METHODS, LoRAConfig, inject
from adapters.base import AdapterLinear


@pytest.mark.parametrize("method", METHODS)
def test_layers_choose_among_the_targets(method: str) -> None:
    model = inject(toy(), METHODS[method](targets=("wq", "ffn.0"), layers=(1,)))
    found = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.requires_grad}
    assert found == {"blocks.1.attn.wq", "blocks.1.ffn.0"}


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
    with pytest.raises(ValueError, match="'x.0.1.wq' ends in the name of a layer's target"):
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
