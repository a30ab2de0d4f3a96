"""Configs by themselves: what they refuse, which modules are plain, how PEFT spells an option."""

import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS, LoRAConfig
from adapters.config import AdapterConfig, RankConfig, check_count, check_dropout, option
from adapters.layers import AdapterLayer
from adapters.plain import computes_as, made_of_children, plain, plain_linear


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Choosy(nn.Linear):
    """Takes something else than tokens."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError(x)


class Longer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2)


class Rewritten(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def weightless() -> nn.Linear:
    module = nn.Linear(2, 2)
    del module.weight
    module.weight = torch.ones(2, 2)  # type: ignore[assignment]
    return module


def integer() -> nn.Linear:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return module


BOTH = (nn.Linear, nn.LayerNorm)
NOT_PLAIN: list[tuple[nn.Module, tuple[type[nn.Module], ...], str]] = [
    (nn.GELU(), (nn.Linear,), "'x' is a GELU, not an nn.Linear"),
    (nn.GELU(), BOTH, "'x' is a GELU, not an nn.Linear or nn.LayerNorm"),
    (weightless(), (nn.Linear,), "'x' has no weight to adapt"),
    (nn.LayerNorm(2, elementwise_affine=False), BOTH, "'x' has no weight to adapt"),
    (
        nn.Linear(2, 2, device="meta"),
        (nn.Linear,),
        "'x' has no weights yet (device meta); load the base, then inject",
    ),
    (
        integer(),
        (nn.Linear,),
        "'x' has weights of torch.int8; adapters need a floating-point base",
    ),
    *(
        (
            kind(2, 2),
            kinds,
            f"'x' is a {kind.__name__}, which computes something else than the {names} that it "
            "derives from; leave it out of targets",
        )
        for kind in (Doubled, Choosy, Longer)
        for kinds, names in (((nn.Linear,), "nn.Linear"), (BOTH, "nn.Linear or nn.LayerNorm"))
    ),
]


@pytest.mark.parametrize(("module", "kinds", "message"), NOT_PLAIN)
def test_a_module_that_is_not_plain_is_refused_with_the_reason(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], message: str
) -> None:
    with refused(message):
        plain(module, "x", *kinds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_module_that_computes_what_its_class_does_is_plain(dtype: torch.dtype) -> None:
    for module in (nn.Linear(64, 3), Rewritten(64, 3), nn.LayerNorm(5)):
        module.to(dtype)
        before = torch.get_rng_state()
        assert plain(module, "x", *BOTH) is module
        assert torch.equal(torch.get_rng_state(), before)
    assert computes_as(Rewritten(64, 3).to(dtype), nn.Linear)
    assert not computes_as(Doubled(64, 3).to(dtype), nn.Linear)
    assert plain_linear(nn.Linear(2, 2), "x")
    with refused("'x' is a LayerNorm, not an nn.Linear"):
        plain_linear(nn.LayerNorm(2), "x")


def test_only_a_module_made_of_others_is_wrapped() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert made_of_children(module, "x") is module
    own, buffered = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    own.weight = nn.Parameter(torch.ones(1))
    buffered.register_buffer("b", torch.ones(1))
    for other in (own, buffered, nn.Sequential(nn.GELU())):
        message = (
            "'x' is a Sequential with weights of its own or none; only a module made of others is "
            "wrapped"
        )
        with refused(message):
            made_of_children(other, "x")


def test_counts_and_shares_have_their_ranges() -> None:
    for value in (0, -1, 1.0, "2", None):
        with refused(f"n={value!r} is not a positive integer; 3 is usual"):
            check_count("n", value, "3 is usual")
    for share in (-0.1, 1, math.nan):
        with refused(f"dropout={share} is not in 0 <= dropout < 1; 0 is off"):
            check_dropout(share)
    check_count("n", 1, "")
    check_dropout(0)
    check_dropout(0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "wq"}, "targets='wq' is one string; write ('wq',)"),
        ({"targets": ()}, "targets=() must be one or more names of modules"),
        ({"targets": ["a", 3]}, "targets=('a', 3) must be one or more names of modules"),
        ({"layers": 3}, "layers=3 must be numbers of blocks, such as (4, 5)"),
        ({"layers": (1, -1)}, "layers=(1, -1) must be numbers of blocks, such as (4, 5)"),
        ({"layers": (True,)}, "layers=(True,) must be numbers of blocks, such as (4, 5)"),
        ({"rank": 0}, "rank=0 is not a positive integer; 4 to 32 are usual"),
        ({"rank_pattern": {"a": 0}}, "rank=0 is not a positive integer; 4 to 32 are usual"),
        ({"alpha": 0}, "alpha=0 is not positive; twice the rank is usual"),
        ({"alpha_pattern": {"a": math.inf}}, "alpha=inf is not positive; twice the rank is usual"),
        (
            {"rank_pattern": {"(": 1}},
            "rank_pattern's '(' is no regular expression: missing ), unterminated subpattern at "
            "position 0",
        ),
        (
            {"alpha_pattern": {"(": 1}},
            "alpha_pattern's '(' is no regular expression: missing ), unterminated subpattern at "
            "position 0",
        ),
    ],
)
def test_options_out_of_their_range_are_refused_in_a_whole_sentence(
    options: dict[str, Any], message: str
) -> None:
    with refused(message):
        LoRAConfig(**options)


def test_options_on_the_edge_are_taken() -> None:
    made = LoRAConfig(targets=["a"], layers=range(2), rank=1, alpha=1e-9, rank_pattern=None)
    assert (made.targets, made.layers, made.rank_pattern) == (("a",), (0, 1), {})


def test_patterns_are_for_the_end_of_a_name_and_the_first_counts() -> None:
    ranks, alphas = {"a.wq": 1, "wq": 2, "w.": 3}, {"b.wv": 4.0}
    made = LoRAConfig(rank=9, alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    for name, expected in {
        "x.a.wq": (1, 8),
        "a.wq": (1, 8),
        "xa.wq": (2, 8),
        "b.wv": (3, 4.0),
        "xwq": (9, 8),
        "wq.x": (9, 8),
    }.items():
        assert made.rank_and_alpha(name) == expected
    made = LoRAConfig(targets=("wq",), alpha_pattern={"wk": 1.0})
    with refused("pattern 'wk' matches none of the targets ['a.wq']"):
        made.adapt_all({"a.wq": nn.Linear(2, 2)})


@dataclass(frozen=True, kw_only=True)
class Own(AdapterConfig):
    """A method with an option that PEFT has, and one that it does not."""

    targets: tuple[str, ...] = ("a",)
    sign: bool = option(False, "of the update")
    extra: float = option(0.5, "ours alone")

    peft_marks = {"peft_type": "OWN", "is_own": True}
    peft_options = AdapterConfig.peft_options | {"sign": "use_sign"}
    peft_defaults = {"use_sign": True}
    peft_ignored = AdapterConfig.peft_ignored | {"note"}

    def adapt(self, module: nn.Module, name: str) -> AdapterLayer:
        return AdapterLayer()


WRITTEN = {"peft_type": "OWN", "is_own": True, "target_modules": ["a", "b"], "use_sign": False}


def test_a_config_is_written_and_read_as_peft_spells_it() -> None:
    made = Own(targets=("a", "b"), extra=0.25)
    assert made.to_peft() == WRITTEN
    assert made.kept_options() == {"extra": 0.25}
    assert Own().kept_options() == {}
    assert Own.from_peft(WRITTEN) == Own(targets=("a", "b"))
    without = {key: value for key, value in WRITTEN.items() if key != "use_sign"}
    assert Own.from_peft(without).sign is True
    assert made.lr_factors() == made.shared() == {}
    with refused("layers=(1,) are not names yet; inject the config first"):
        Own(layers=(1,)).to_peft()


def test_a_config_is_read_by_the_method_whose_marks_it_has() -> None:
    assert Own.reads(WRITTEN)
    assert not Own.reads(WRITTEN | {"is_own": False})
    assert not Own.reads({"peft_type": "OWN"})
    assert LoRAConfig.reads({"peft_type": "LORA"})  # a mark left out is False
    assert [name for name, kind in METHODS.items() if kind.reads({"peft_type": "VERA"})] == ["vera"]


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, "none"])
def test_an_option_that_is_off_is_no_hindrance(value: Any) -> None:
    assert Own.from_peft(WRITTEN | {"unknown": value}) == Own(targets=("a", "b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 3}, "option unknown=3 is not supported by Own"),
        ({"use_sign": 1}, "option use_sign=1 is neither true nor false"),
        ({"target_modules": None}, "an option has a value of the wrong type: "),
    ],
)
def test_what_a_file_tells_wrongly_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Own.from_peft(WRITTEN | change)
    with refused("option 'target_modules' is missing"):
        Own.from_peft({"peft_type": "OWN", "is_own": True})
    assert Own.from_peft(WRITTEN | {"note": 3, "revision": "x"})


def test_an_empty_pattern_is_not_written() -> None:
    assert "rank_pattern" not in LoRAConfig().to_peft()
    assert LoRAConfig(rank_pattern={"a": 2}).to_peft()["rank_pattern"] == {"a": 2}
    assert issubclass(LoRAConfig, RankConfig)


class Dropping(nn.Linear):
    """Drops weights in training only, as DropConnect does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.dropout(self.weight, 0.5, self.training)
        return nn.functional.linear(x, weight, self.bias)


class Renormed(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, None, None, self.eps)


def test_a_norm_over_several_axes_is_held_against_its_class_too() -> None:
    assert computes_as(Renormed((5, 4)), nn.LayerNorm)
    changed = Renormed((5, 4))
    nn.init.normal_(changed.weight)
    assert not computes_as(changed, nn.LayerNorm)


@pytest.mark.parametrize("training", [True, False])
def test_what_differs_in_training_only_is_refused_in_either_mode(training: bool) -> None:
    module, state = Dropping(4, 4).train(training), torch.get_rng_state()
    assert not computes_as(module, nn.Linear)
    assert module.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_that_an_adapter_would_lose_are_refused() -> None:
    module = Rewritten(2, 2)
    module.register_buffer("steps", torch.zeros(1))
    with refused("'x' is a Rewritten with 'steps' too, which an adapter would lose"):
        plain_linear(module, "x")


def test_parts_on_meta_are_not_wrapped() -> None:
    part = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with refused("'x' has no weights yet (device meta); load the base, then inject"):
        made_of_children(part, "x")
