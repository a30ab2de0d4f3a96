"""What a method's own tensors start from: shapes, dtypes, bounds; and one layer by itself."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS
from adapters.config import option
from adapters.methods.inits import INITS
from adapters.methods.lokr import factorise
from tests.adapters.toy import config, toy

LINEAR = ("lora", "dora", "loha", "lokr", "vera", "ia3", "ssf", "bitfit")


def layer(method: str, base: nn.Module | None = None, **options: Any) -> nn.Module:
    base = base or nn.Linear(64, 36)
    return METHODS[method](targets=("x",), **options).adapt(base, "x")


def own(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if n not in ("weight", "bias")}


SHAPES: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("lora", {"rank": 3}, {"lora_a": (3, 64), "lora_b": (36, 3)}),
    ("dora", {"rank": 3}, {"lora_a": (3, 64), "lora_b": (36, 3), "magnitude": (36,)}),
    ("loha", {"rank": 3}, {"a1": (3, 64), "b1": (36, 3), "a2": (3, 64), "b2": (36, 3)}),
    ("lokr", {"rank": 4}, {"c": (6, 8), "d": (6, 8)}),
    ("lokr", {"rank": 3}, {"c": (6, 8), "d_b": (6, 3), "d_a": (3, 8)}),
    (
        "lokr",
        {"rank": 3, "decompose_both": True, "decompose_factor": 4},
        {"c": (4, 4), "d_b": (9, 3), "d_a": (3, 16)},
    ),
    ("vera", {"rank": 5}, {"lambda_b": (36,), "lambda_d": (5,)}),
    ("ia3", {}, {"factors": (36, 1)}),
    ("ia3", {"feedforward": ("x",)}, {"factors": (1, 64)}),
    ("ssf", {}, {"gamma": (36,), "beta": (36,)}),
]


@pytest.mark.parametrize(("method", "options", "shapes"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_own_tensors_have_their_shapes_and_are_wide(
    method: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    made = own(layer(method, nn.Linear(64, 36, dtype=dtype), **options))
    assert {name: tuple(p.shape) for name, p in made.items()} == shapes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in made.values()} == {wide}


@pytest.mark.parametrize(
    ("method", "drawn", "zero"),
    [
        ("lora", {"lora_a": 64}, ["lora_b"]),
        ("dora", {"lora_a": 64}, ["lora_b"]),
        ("loha", {"a1": 64, "b1": 30, "b2": 30}, ["a2"]),
        ("lokr", {"d": 8}, ["c"]),
    ],
)
def test_factors_start_within_one_over_the_root_of_what_they_read(
    method: str, drawn: dict[str, int], zero: list[str]
) -> None:
    made = own(layer(method, rank=30))
    for name, n_in in drawn.items():
        bound = 1 / math.sqrt(n_in)
        assert 0.9 * bound < made[name].max() <= bound
        assert -bound <= made[name].min() < -0.9 * bound
    assert not any(made[name].any() for name in zero)


@pytest.mark.parametrize("name", INITS)
def test_starts_are_of_the_shapes_of_the_factors_in_float32_or_wider(name: str) -> None:
    weight = torch.randn(36, 64).bfloat16()
    a, b = INITS[name](weight, 5, 2.0)
    assert (a.shape, b.shape) == ((5, 64), (36, 5))
    assert a.dtype == b.dtype == torch.float32
    if name == "gaussian":
        assert a.std().item() == pytest.approx(1 / 5, rel=0.15)
        assert a.mean().abs() < 0.05
    if name in ("kaiming", "gaussian"):
        assert not b.any()


def test_projections_are_uniform_within_kaimings_bound_and_drawn_from_their_seed() -> None:
    one, same, other = (layer("vera", rank=200, projection_seed=i).projections for i in (0, 0, 1))
    for name, shape in (("a", (200, 64)), ("b", (36, 200))):
        tensor = getattr(one, name)
        bound = math.sqrt(6 / shape[1])
        assert tensor.shape == shape
        assert 0.99 * bound < tensor.max() <= bound
        assert -bound <= tensor.min() < -0.99 * bound
        assert torch.equal(tensor, getattr(same, name))
        assert not torch.equal(tensor, getattr(other, name))
    module = layer("vera", rank=4, d_initial=0.3)
    assert module.lambda_d.tolist() == pytest.approx([0.3] * 4)
    assert not module.lambda_b.any()


@pytest.mark.parametrize("method", LINEAR)
def test_one_layer_by_itself_is_as_in_a_model_and_refuses_by_its_name(method: str) -> None:
    with pytest.raises(ValueError, match="^'x' is a GELU, not an nn.Linear"):
        layer(method, nn.GELU())
    base, x = nn.Linear(64, 36), torch.randn(2, 64)
    torch.testing.assert_close(layer(method, base)(x), base(x))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_patterns_choose_the_scale_and_rank_of_one_layer(method: str) -> None:
    options: dict[str, Any] = {"rank": 4, "alpha": 8, "rank_pattern": {"x": 2}}
    assert layer(method, **options).scale == 4.0
    assert layer(method, **options | {"alpha_pattern": {"x": 3.0}}).scale == 1.5


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_the_adapted_weight_is_exact_under_autocast(method: str) -> None:
    module = layer(method)
    for p in own(module).values():
        nn.init.normal_(p)
    expected = module.adapted_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.adapted_weight(), expected)


def test_an_option_has_its_help_and_a_default_of_its_own() -> None:
    plain, mapping = option(3, "three"), option({}, "none")
    assert (plain.default, plain.metadata["help"]) == (3, "three")
    assert mapping.metadata["help"] == "none"
    assert mapping.default_factory() == {}
    assert mapping.default_factory() is not mapping.default_factory()


@pytest.mark.parametrize("method", ["ssf", "norm", "ia3"])
def test_terms_leave_out_a_bias_that_is_not_there(method: str) -> None:
    base = nn.LayerNorm(8, bias=False) if method == "norm" else nn.Linear(8, 8, bias=False)
    terms = layer(method, base).terms()
    assert all(isinstance(term, Tensor) for term in terms.values())
    assert ("bias" in terms) is (method == "ssf")


def test_which_of_the_targets_multiply_inputs_is_told_by_their_ends() -> None:
    model = config("ia3 of inputs").adapt_all(
        {name: m for name, m in toy().named_modules() if name.endswith(("wq", "wv", "ffn.0"))}
    )
    inputs = {name for name, m in model.items() if m.factors.shape[0] == 1}
    assert inputs == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.wv", "ffn.0")}


@pytest.mark.parametrize("method", ["norm", "ssf", "bitfit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_norm_starts_at_the_base_and_is_wide(method: str, dtype: torch.dtype) -> None:
    base = nn.LayerNorm(8, eps=0.2, dtype=dtype)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    module, x = layer(method, base), torch.randn(3, 8, dtype=dtype)
    torch.testing.assert_close(module(x), base(x))
    assert module(x).dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in own(module).values()} == {wide}
    before = base(x)
    with torch.no_grad():
        for p in own(module).values():
            p.add_(1.0)
    assert not torch.allclose(module(x), before)
    torch.testing.assert_close(module.merged(base)(x), module(x), rtol=0.02, atol=0.02)
    module.enabled = False
    assert torch.equal(module(x), before)
    assert torch.equal(base(x), before)  # what trains is a copy
    with pytest.raises(ValueError, match="^'x' is a GELU, not an nn."):
        layer(method, nn.GELU())


def test_tuned_norms_are_their_formula() -> None:
    for bias in (True, False):
        module = layer("norm", nn.LayerNorm(8, bias=bias))
        nn.init.normal_(module.tuned_weight)
        if bias:
            nn.init.normal_(module.tuned_bias)
        x = torch.randn(3, 8)
        expected = nn.functional.layer_norm(x, (8,), module.tuned_weight, module.tuned_bias)
        torch.testing.assert_close(module(x), expected)
        terms = module.terms()
        assert terms["gain"] is module.tuned_weight
        assert terms.keys() == ({"gain", "bias"} if bias else {"gain"})
        torch.testing.assert_close(module.adapted_weight(), module.tuned_weight)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *(
            (
                "lokr",
                {"decompose_factor": n},
                f"decompose_factor={n} is neither positive nor -1; -1 factorises near the square "
                "root",
            )
            for n in (0, -2)
        ),
        *(
            ("vera", {"projection_seed": n}, f"projection_seed={n} is not in 0 <= seed < 2**63")
            for n in (-1, 2**63)
        ),
        (
            "lora",
            {"init": "x"},
            "init='x' is unknown; choose from kaiming, gaussian, pissa, olora",
        ),
    ],
)
def test_options_of_methods_are_refused_in_a_whole_sentence(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        METHODS[method](**options)


def test_options_on_the_edge_of_their_range_are_taken() -> None:
    assert METHODS["lokr"](decompose_factor=1).decompose_factor == 1
    assert METHODS["vera"](projection_seed=2**63 - 1).projection_seed == 2**63 - 1
    module = layer("lora", nn.Linear(6, 4), rank=4, init="pissa")
    assert len(module.lora_a) == 4
    with pytest.raises(ValueError, match=r"^rank=5 exceeds the smaller side of 'x', \(4, 6\)"):
        layer("lora", nn.Linear(6, 4), rank=5, init="pissa")


@pytest.mark.parametrize(("size", "factor", "first"), [(35, 4, 1), (35, -1, 5), (36, 5, 4)])
def test_a_factor_that_does_not_divide_bounds_the_first(size: int, factor: int, first: int) -> None:
    assert factorise(size, factor) == (first, size // first)
