"""Blocks with prompts and feed-forwards with a bottleneck: starts, dropout, what they refuse."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS
from tests.adapters.toy import toy


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_prompts_are_within_xaviers_bound_and_wide() -> None:
    block = toy().blocks[0].bfloat16()
    layer = METHODS["vpt"](n_prompts=500, dropout=0.25).adapt(block, "blocks.0")
    bound = math.sqrt(6 / (2 * 8))
    assert layer.prompts.shape == (1, 500, 8)
    assert layer.prompts.dtype == torch.float32
    assert 0.98 * bound < layer.prompts.max() <= bound
    assert -bound <= layer.prompts.min() < -0.98 * bound
    assert layer.prompts.requires_grad
    assert layer.prompt_dropout == 0.25


class Taking(nn.Module):
    """Takes what it is given beside its tokens, and gives what it is told to."""

    def __init__(self, gives: Any = None) -> None:
        super().__init__()
        self.norm, self.gives = nn.LayerNorm(8), gives
        self.seen: list[Any] = []

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        self.seen.append((rest, named))
        return self.norm(x) if self.gives is None else self.gives


def test_prompts_hand_on_what_is_no_tensor_and_refuse_the_rest() -> None:
    x, base = torch.randn(2, 3, 8), Taking()
    layer = METHODS["vpt"](n_prompts=2, dropout=0.9).adapt(base, "b")
    assert layer.eval()(x, 1, [None], flag={"a": (2,)}).shape == (2, 3, 8)
    assert base.seen == [((1, [None]), {"flag": {"a": (2,)}})]
    message = (
        "VPT adds tokens, but 'b' reads positions or a mask beside its tokens; "
        "choose another method"
    )
    for rest, named in (((x,), {}), ((), {"m": x}), (([(x,)],), {}), ((), {"m": {"a": [x]}})):
        with refused(message):
            layer(x, *rest, **named)
    layer.enabled = False
    assert torch.equal(layer(x, x, m=x), base.norm(x))
    other = METHODS["vpt"](n_prompts=2).adapt(Taking(gives=(x,)), "b")
    message = "VPT adds tokens, but 'b' gives a tuple, not tokens; choose another method"
    with refused(message):
        other(x)


def test_a_bottleneck_starts_at_the_base_with_kaimings_bound() -> None:
    base = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8)).bfloat16()
    layer = METHODS["adaptformer"](width=300, scale=0.5, dropout=0.25).adapt(base, "ffn")
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters(recurse=False)}
    assert shapes == {
        "down_weight": (300, 8),
        "down_bias": (300,),
        "up_weight": (8, 300),
        "up_bias": (8,),
    }
    assert {p.dtype for p in layer.parameters(recurse=False)} == {torch.float32}
    bound = 1 / math.sqrt(8)
    assert 0.98 * bound < layer.down_weight.max() <= bound
    assert not any(p.any() for n, p in layer.named_parameters(recurse=False) if n != "down_weight")
    assert (layer.update_scale, layer.update_dropout) == (0.5, 0.25)


def test_a_bottleneck_drops_hidden_numbers_in_training_only() -> None:
    base = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))
    layer = METHODS["adaptformer"](width=64, dropout=0.5).adapt(base, "ffn")
    nn.init.normal_(layer.up_weight)
    x = torch.randn(1, 3, 8)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(
    ("method", "module", "message"),
    [
        (
            "vpt",
            nn.Sequential(nn.Linear(2, 2)),
            "'x' has no nn.LayerNorm that tells its width; VPT needs one",
        ),
        *(
            (
                "adaptformer",
                module,
                "'x' is no feed-forward, whose output is as wide as its input; AdaptFormer adapts "
                "feed-forwards",
            )
            for module in (
                nn.Sequential(nn.Conv1d(1, 1, 1)),
                nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)),
            )
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused_in_a_whole_sentence(
    method: str, module: nn.Module, message: str
) -> None:
    with refused(message):
        METHODS[method]().adapt(module, "x")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *(
            ("adaptformer", {"width": n}, f"width={n!r} is not a positive integer; 64 is usual")
            for n in (0, -3)
        ),
        *(
            ("adaptformer", {"scale": x}, f"scale={x!r} is not positive; 0.1 is usual")
            for x in (0, -1.0, math.inf)
        ),
        ("vpt", {"n_prompts": 0}, "n_prompts=0 is not a positive integer; try 10"),
        *(
            (method, {"dropout": 1}, "dropout=1 is not in 0 <= dropout < 1; 0 is off")
            for method in ("vpt", "adaptformer")
        ),
    ],
)
def test_options_out_of_their_range_are_refused_in_a_whole_sentence(
    method: str, options: dict[str, Any], message: str
) -> None:
    with refused(message):
        METHODS[method](**options)


class Asking(nn.Sequential):
    """A feed-forward that takes more than its tokens."""

    def forward(self, x: Tensor, add: float, *, times: float) -> Tensor:
        return (super().forward(x) + add) * times


def test_a_bottleneck_is_its_formula_and_hands_on_what_its_base_takes() -> None:
    base, x = Asking(nn.Linear(8, 9), nn.Linear(9, 8)), torch.randn(2, 3, 8)
    layer = METHODS["adaptformer"](width=4, scale=0.5).adapt(base, "ffn")
    for p in layer.parameters(recurse=False):
        nn.init.normal_(p)
    hidden = (x @ layer.down_weight.T + layer.down_bias).clamp(min=0)
    update = 0.5 * (hidden @ layer.up_weight.T + layer.up_bias)
    torch.testing.assert_close(layer(x, 1.0, times=2.0), base(x, 1.0, times=2.0) + update)
    low = layer.bfloat16()
    assert low(x.bfloat16(), 1.0, times=2.0).dtype == torch.bfloat16


def test_prompts_drop_out_in_training_only_and_fit_a_base_of_16_bits() -> None:
    block = toy().blocks[0]
    layer = METHODS["vpt"](n_prompts=3, dropout=0.5).adapt(block, "b").eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = block(torch.cat([x, layer.prompts.expand(2, -1, -1)], dim=1))[:, :3]
    torch.testing.assert_close(layer(x), expected)
    low = METHODS["vpt"](n_prompts=3).adapt(toy().blocks[0].bfloat16(), "b")
    assert low.prompts.dtype == torch.float32
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_a_module_with_weights_of_its_own_is_refused_by_its_name() -> None:
    for method in ("vpt", "adaptformer"):
        message = (
            "'x' is a Linear with weights of its own or none; only a module made of others is "
            "wrapped"
        )
        with refused(message):
            METHODS[method]().adapt(nn.Linear(2, 2), "x")
