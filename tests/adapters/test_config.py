"""What holds for every layer and config, whatever the method."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapters import METHODS, DoRAConfig, LoRAConfig, disabled, inject
from adapters.layers import AdapterLayer
from tests.adapters.toy import KINDS, WRAPPERS, X, adapted, config, every_kind, toy
from tests.shared import ALL, long, some

LINEAR = [kind for kind in KINDS if kind not in ("norm", *WRAPPERS)]
on_linears = pytest.mark.parametrize("kind", LINEAR)
low_rank = pytest.mark.parametrize("kind", ["lora", "dora"])


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(8, 9, bias=bias, dtype=torch.float64)


def layer(kind: str, bias: bool = True, **options: object) -> AdapterLayer:
    adapter = config(kind, **options).adapt(linear(bias), "wq")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name not in ("weight", "bias"):
                parameter.add_(torch.randn_like(parameter))
    return adapter


@on_linears
def test_a_layer_shares_the_base_parameters(kind: str) -> None:
    base = linear()
    adapter = config(kind).adapt(base, "wq")
    assert isinstance(adapter, nn.Linear)
    assert adapter.weight is base.weight
    assert adapter.bias is base.bias


@pytest.mark.parametrize(
    ("kind", "bias"),
    [(kind, bias) for kind in LINEAR for bias in (True, False) if bias or kind != "bitfit"],
)
def test_the_adapted_weight_is_what_forward_computes(kind: str, bias: bool) -> None:
    adapter = layer(kind, bias).eval()
    for n in (4, 40):  # too few tokens to add the update to the weight first, and enough
        x = torch.randn(n, 8, dtype=torch.float64)
        expected = F.linear(x, adapter.adapted_weight(), adapter.adapted_bias())
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-12)
        if bias or kind != "ssf":
            torch.testing.assert_close(
                adapter.merged(nn.Linear(8, 8, bias=bias))(x), expected, rtol=0, atol=1e-12
            )


def test_what_needs_a_bias_says_so() -> None:
    with pytest.raises(ValueError, match="SSFLinear cannot be merged: the base's module has no bi"):
        layer("ssf", bias=False).merged(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'wq' has no bias for BitFit to train; leave it out"):
        layer("bitfit", bias=False)


@on_linears
def test_a_layer_switched_off_is_the_base(kind: str) -> None:
    adapter, x = layer(kind), torch.randn(4, 8, dtype=torch.float64)
    adapter.enabled = False
    assert torch.equal(adapter(x), linear()(x))


@low_rank
def test_dropout_acts_in_training_only_and_keeps_the_mean(kind: str) -> None:
    adapter, x = layer(kind, dropout=0.5), torch.randn(1, 8, dtype=torch.float64)
    expected = adapter.eval()(x)
    drawn = adapter.train()(x.expand(20_000, -1))
    deviation = drawn.std(dim=0)
    assert (deviation > 0).all()
    assert ((drawn.mean(dim=0) - expected[0]).abs() < 5 * deviation / 20_000**0.5).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_cast_after_injection_goes_on_working(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind)
    expected = model(X)
    output = model.to(dtype)(X.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.1)


@on_linears
def test_autocast_leaves_the_adapted_weight_in_full_precision(kind: str) -> None:
    adapter = layer(kind).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(torch.randn(4, 8)).dtype == torch.bfloat16
        weight = adapter.adapted_weight()
    assert torch.equal(weight, adapter.adapted_weight())


@every_kind
def test_copies_and_pickles_of_an_adapted_model_are_independent(kind: str) -> None:
    model = adapted(kind)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        record = vars(twin)["_injection"]
        for name in record.adapted:
            own, theirs = (dict(m.get_submodule(name).named_parameters()) for m in (twin, model))
            assert not {id(p) for p in own.values()} & {id(p) for p in theirs.values()}
            for key, parameter in record.adapted[name].named_parameters():
                assert own[key] is parameter


@long
@pytest.mark.parametrize("kind", KINDS if ALL else some([*METHODS], 7))
def test_compiled_in_place_equals_eager_with_adapters_on_off_and_on(kind: str) -> None:
    model = adapted(kind)
    keys, on, off = list(model.state_dict()), model(X), toy()(X)
    assert torch._dynamo.explain(model)(X).graph_break_count == 0
    torch._dynamo.reset()
    model.compile(backend="eager")
    assert torch.equal(model(X), on)
    with disabled(model):
        assert torch.equal(model(X), off)
    assert torch.equal(model(X), on)
    assert list(model.state_dict()) == keys


@long
@pytest.mark.parametrize("kind", KINDS if ALL else ["lora"])
def test_a_compiled_model_can_be_adapted(kind: str) -> None:
    model, expected = toy().eval(), adapted(kind)
    model.compile(backend="eager")
    model(X)
    inject(model, config(kind), trainable=("head",)).load_state_dict(expected.state_dict())
    assert torch.equal(model(X), expected(X))


def test_lora_is_its_formula() -> None:
    adapter, x = layer("lora").eval(), torch.randn(4, 8, dtype=torch.float64)
    expected = linear()(x) + 2 * (x @ adapter.lora_a.T @ adapter.lora_b.T)
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-12)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    base = nn.Linear(16, 16)
    assert LoRAConfig(rank=16, alpha=8).adapt(base, "wq").scale == 0.5
    assert LoRAConfig(rank=16, alpha=8, use_rslora=True).adapt(base, "wq").scale == 2


def test_dora_scales_every_row_to_its_magnitude() -> None:
    adapter = layer("dora")
    norms = adapter.adapted_weight().norm(dim=1)
    torch.testing.assert_close(norms, adapter.magnitude.abs())


def test_dora_takes_the_norm_for_a_constant() -> None:
    adapter, x = layer("dora"), torch.randn(4, 8, dtype=torch.float64)
    c = (adapter.magnitude / adapter.row_norm()).detach()
    adapter(x).sum().backward()
    expected = 2 * torch.outer(c, adapter.lora_a.detach() @ x.sum(dim=0))
    torch.testing.assert_close(adapter.lora_b.grad, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is not a positive integer"),
        ({"rank": 2.5}, "rank=2.5 is not a whole number"),
        ({"alpha": 0}, "alpha=0 is not positive"),
        ({"alpha": float("nan")}, "alpha=nan is not positive"),
        ({"dropout": 1.0}, "dropout=1.0 is not in 0 <= dropout < 1"),
        ({"targets": "wq"}, r"targets='wq' is one string; write \('wq',\)"),
        ({"targets": ()}, "must be one or more names"),
        ({"targets": (3,)}, "must be one or more names"),
    ],
)
@low_rank
def test_an_option_out_of_range_is_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[kind](**options)


@low_rank
def test_a_layer_that_cannot_be_adapted_is_refused(kind: str) -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    cases = [
        (
            Own(8, 8),
            2,
            "'wq' is a Own, which computes something else than the nn.Linear that it derives",
        ),
        (nn.LayerNorm(8), 2, "'wq' is a LayerNorm, not an nn.Linear"),
        (nn.Linear(8, 8, device="meta"), 2, r"'wq' has no weights yet \(device meta\)"),
    ]
    quantized = nn.Linear(8, 8)
    quantized.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    cases.append((quantized, 2, "'wq' has weights of torch.int8; adapters need a floating-point"))
    for module, rank, message in cases:
        with pytest.raises(ValueError, match=message):
            METHODS[kind](rank=rank).adapt(module, "wq")


def test_a_rank_may_exceed_the_sides_unless_the_start_is_of_the_weight() -> None:
    LoRAConfig(rank=9).adapt(linear(), "wq")
    with pytest.raises(ValueError, match=r"rank=9 exceeds the smaller side of 'wq', \(9, 8\)"):
        LoRAConfig(rank=9, init="pissa").adapt(linear(), "wq")


@dataclass(frozen=True, kw_only=True)
class Sized(LoRAConfig):
    """LoRA with another size that the tensors of a file tell."""

    depth: int = 3


def test_sizes_follow_the_patterns_of_ranks_alone() -> None:
    sized = Sized(rank=4, rank_pattern={"wq": 2}, depth=5)
    found = [sized.size(option, name) for option in ("rank", "depth") for name in ("wq", "wv")]
    assert found == [2, 4, 5, 5]


def test_dora_refuses_rows_of_zeros() -> None:
    base = nn.Linear(8, 8)
    nn.init.zeros_(base.weight[3])
    with pytest.raises(ValueError, match="'head' has rows of zeros.*use LoRA there"):
        DoRAConfig().adapt(base, "head")


def test_a_method_that_cannot_merge_says_so() -> None:
    with pytest.raises(ValueError, match="AdapterLayer cannot be merged; keep it, or eject it"):
        AdapterLayer().merged(nn.Linear(1, 1))


@every_kind
def test_equal_seeds_give_equal_adapters(kind: str) -> None:
    one, two = (inject(toy(), config(kind)).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
