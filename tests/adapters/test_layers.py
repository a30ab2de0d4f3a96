"""Layers that take a base's place: dtypes, folding, merging, wrapping, and what they refuse."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS
from adapters.layers import (
    AdapterLayer,
    AdapterLinear,
    AdapterNorm,
    AffineLayer,
    Wrapper,
    cast_to,
    keeps_small_updates,
    wide,
    wide_dtype,
    with_parameters,
)
from tests.adapters.toy import toy

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_trains_is_in_float32_or_wider(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert wide_dtype(x) == wide(x).dtype == expected
    assert keeps_small_updates(x) is (dtype in (torch.float32, torch.float64))
    like = torch.ones(1, dtype=torch.float64)
    assert cast_to(x, like).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_to(x, like) is x
        assert not keeps_small_updates(x)
    assert cast_to(x.to("meta"), like).dtype == torch.float64


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_no_update_is_folded_where_products_of_float32_are_rounded(precision: str) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    x = torch.ones(9, 6)
    assert frozen().folds_update(x)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
        assert not frozen().folds_update(x)
        assert frozen().double().folds_update(x.double())
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert frozen().folds_update(x)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


def frozen(bias: bool = True) -> AdapterLinear:
    return AdapterLinear(nn.Linear(6, 4, bias=bias).requires_grad_(False))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6), True), ((4, 6), False), ((1, 5, 6), True), ((2, 2, 6), False), ((6,), False)],
)
def test_an_update_is_folded_where_there_are_more_tokens_than_the_smaller_side(
    shape: tuple[int, ...], expected: bool
) -> None:
    assert frozen().folds_update(torch.ones(shape)) is expected
    assert frozen(bias=False).folds_update(torch.ones(shape)) is expected
    tall = AdapterLinear(nn.Linear(4, 6).requires_grad_(False))
    assert tall.folds_update(torch.ones(*shape[:-1], 4)) is expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_an_update_is_not_folded_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = frozen(), torch.ones(9, 6)
    assert layer.folds_update(x)
    assert not layer.folds_update(x.to("meta"))
    assert not layer.folds_update(x.double())
    for name in ("weight", "bias"):
        layer.get_parameter(name).requires_grad_(True)
        assert not layer.folds_update(x)
        layer.get_parameter(name).requires_grad_(False)
    found: list[bool] = []
    torch.func.jvp(lambda y: found.append(layer.folds_update(y)) or y, (x,), (x,))
    assert found == [False]
    for module, name in ((torch.compiler, "is_exporting"), (torch._C, "_get_tracing_state")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert not layer.folds_update(x)
    assert layer.folds_update(x)


def test_adapted_weight_and_bias_are_the_bases_wide() -> None:
    base = nn.Linear(3, 2).bfloat16()
    layer = AdapterLinear(base)
    assert torch.equal(layer.adapted_weight(), base.weight.float())
    assert torch.equal(layer.adapted_bias(), base.bias.float())
    assert AdapterLinear(nn.Linear(3, 2, bias=False)).adapted_bias() is None
    with pytest.raises(NotImplementedError):
        AffineLayer().compute(torch.ones(1), torch.ones(1), None)


class Shifted(AdapterLinear):
    """Adds numbers to the weight and the bias."""

    by: tuple[float, float] = (0.0, 0.0)

    def adapted_weight(self) -> Tensor:
        return wide(self.weight) + self.by[0]

    def adapted_bias(self) -> Tensor | None:
        return None if self.bias is None else wide(self.bias) + self.by[1]


@pytest.mark.parametrize("by", [(1.0, 0.0), (1.0, 2.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_bakes_in_what_changed_and_keeps_the_rest(
    by: tuple[float, float], bias: bool
) -> None:
    base = nn.Linear(3, 2, bias=bias).bfloat16()
    base.note = "kept"
    layer = Shifted(base)
    layer.by = by
    merged = layer.merged(base)
    assert type(merged) is nn.Linear
    assert merged.note == "kept"
    assert merged.weight.dtype == torch.bfloat16
    assert torch.equal(merged.weight, (base.weight.float() + by[0]).bfloat16())
    if not bias:
        assert merged.bias is None
    elif by[1]:
        assert torch.equal(merged.bias, (base.bias.float() + by[1]).bfloat16())
    else:
        assert merged.bias is base.bias
    assert not torch.equal(merged.weight, base.weight)


def test_a_norm_keeps_its_shape_and_eps() -> None:
    base = nn.LayerNorm((2, 3), eps=0.5, bias=False)
    layer, x = AdapterNorm(base), torch.randn(4, 2, 3)
    assert layer.weight is base.weight
    assert layer.bias is None
    torch.testing.assert_close(layer.compute(x, base.weight, None), base(x))


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_what_a_layer_cannot_do_it_says() -> None:
    with refused("AdapterLayer cannot be merged; keep it, or eject it"):
        AdapterLayer().merged(nn.Linear(1, 1))
    with refused("AdapterLayer cannot be stacked in a bank; load it alone"):
        AdapterLayer().terms()
    layer = METHODS["ssf"](targets=("x",)).adapt(nn.Linear(2, 2, bias=False), "x")
    message = (
        "SSFLinear cannot be merged: the base's module has no bias to hold its shift; "
        "keep it, or eject it"
    )
    with refused(message):
        layer.merged(nn.Linear(2, 2))


class Own(Wrapper):
    """Doubles what the base computes."""

    factor: float

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def test_a_wrapper_is_of_both_classes_and_shares_the_bases_parts() -> None:
    base = toy().blocks[0].eval()
    base.register_buffer("buffer", torch.ones(1))
    base.register_parameter("own", nn.Parameter(torch.ones(1)))
    layer = Own.around(base)
    layer.factor = 3.0
    assert isinstance(layer, Own)
    assert isinstance(layer, type(base))
    assert type(layer).__name__ == "Own"
    assert type(layer).__module__ == __name__
    assert type(layer).__doc__ == Own.__doc__
    assert type(Own.around(toy().blocks[1])) is type(layer)
    assert layer._modules is base._modules
    assert not layer._parameters
    assert not layer._buffers
    assert not layer.training
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), 3 * base(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        assert twin.attn.wq.weight is not layer.attn.wq.weight


@pytest.mark.parametrize("name", ["factor", "enabled"])
def test_a_base_that_uses_a_wrappers_names_is_refused(name: str) -> None:
    base = toy().blocks[0]
    setattr(base, name, 1)
    with refused(f"Block has an attribute '{name}', which Own needs; rename it"):
        Own.around(base)


def test_a_module_with_other_parameters_is_otherwise_the_same_and_of_its_own() -> None:
    base = nn.BatchNorm1d(3)
    base.child = nn.Linear(1, 1)
    weight = nn.Parameter(torch.zeros(3))
    made = with_parameters(base, {"weight": weight})
    assert type(made) is nn.BatchNorm1d
    assert made.weight is weight
    assert made.bias is base.bias
    assert made.child is base.child
    made.child, made.running_mean = nn.Linear(2, 2), torch.ones(3)
    assert base.child.in_features == 1
    assert not base.running_mean.any()
    assert base.weight is not weight
