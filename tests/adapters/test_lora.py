import copy

import pytest
import torch
from torch import Tensor, nn

from adapters.methods.lora import FoldedProduct, LoRAConfig, LoRALinear
from tests.shared import long


def layer(bias: bool = True, dropout: float = 0.0) -> LoRALinear:
    """Return a float64 layer with a random update that trains, around a frozen base."""
    base = nn.Linear(5, 4, bias=bias).double().requires_grad_(False)
    adapted = LoRAConfig(targets=("x",), rank=2, alpha=3, dropout=dropout).adapt(base, "x")
    nn.init.normal_(adapted.lora_b)
    return adapted


def plain(adapted: LoRALinear, x: Tensor) -> Tensor:
    """Return W x + b + scale B A x, as the paper writes it."""
    update = x @ adapted.lora_a.T @ adapted.lora_b.T
    return nn.functional.linear(x, adapted.weight, adapted.bias) + adapted.scale * update


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_products_gradients_are_those_of_finite_differences(bias: bool) -> None:
    adapted = layer(bias)
    x = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return FoldedProduct.apply(x, adapted.weight, adapted.bias, a, b, adapted.scale)

    assert torch.autograd.gradcheck(function, (x, adapted.lora_a, adapted.lora_b), atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (3, 4, 5), (2, 2, 3, 5), (1, 5), (5,), (0, 5)])
def test_every_order_of_products_gives_the_plain_formula(
    bias: bool, shape: tuple[int, ...]
) -> None:
    adapted = layer(bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = (x, adapted.lora_a, adapted.lora_b)
    direction = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    found = torch.autograd.grad((adapted(x) * direction).sum(), tensors)
    expected = torch.autograd.grad((plain(adapted, x) * direction).sum(), tensors)
    torch.testing.assert_close(adapted(x), plain(adapted, x), rtol=0, atol=1e-12)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_an_update_is_folded_only_where_it_pays_and_is_exact() -> None:
    many, few = torch.randn(9, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    adapted = layer()
    assert adapted.folds_update(many)
    assert not adapted.folds_update(few)
    assert not adapted.folds_update(many.bfloat16())
    assert not copy.deepcopy(adapted).bfloat16().folds_update(many.bfloat16())
    assert not layer(dropout=0.5).folds_update(many)
    assert layer(dropout=0.5).eval().folds_update(many)
    adapted.weight.requires_grad_()
    assert not adapted.folds_update(many)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer().float().folds_update(many.float())


@long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_folded_product_compiles_without_graph_breaks() -> None:
    adapted, x = layer(), torch.randn(9, 5, dtype=torch.float64)
    adapted(x).square().sum().backward()
    expected = adapted.lora_a.grad
    adapted.lora_a.grad = None
    adapted.compile(fullgraph=True, backend="aot_eager")
    adapted(x).square().sum().backward()
    torch.testing.assert_close(adapted.lora_a.grad, expected)


def test_no_gradient_as_large_as_the_weight_is_kept() -> None:
    adapted = layer()
    adapted(torch.randn(9, 5, dtype=torch.float64)).sum().backward()
    assert adapted.weight.grad is None
    assert adapted.lora_a.grad is not None


def test_second_derivatives_are_those_of_the_plain_formula() -> None:
    adapted = layer()
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    tensors = (x, adapted.lora_a, adapted.lora_b)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for one, two in zip(penalty(adapted(x)), penalty(plain(adapted, x)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_one_factor_may_be_frozen(frozen: str) -> None:
    adapted, x = layer(), torch.randn(9, 5, dtype=torch.float64)
    adapted.get_parameter(frozen).requires_grad_(False)
    (trained,) = [p for p in adapted.parameters() if p.requires_grad]
    (found,) = torch.autograd.grad(adapted(x).pow(2).sum(), [trained])
    (expected,) = torch.autograd.grad(plain(adapted, x).pow(2).sum(), [trained])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_frozen_weight_has_its_gradient_inside_functional_transforms() -> None:
    models, x = [layer() for _ in range(3)], torch.randn(3, 9, 5, dtype=torch.float64)
    stacked, _ = torch.func.stack_module_state(models)

    def alone(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], own, (x,)).square().sum()

    def loss(every: dict[str, Tensor]) -> Tensor:
        return torch.vmap(alone)(every, x).sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in stacked.items()})
    for i, model in enumerate(models):
        own = dict(model.requires_grad_(True).named_parameters())
        expected = torch.autograd.grad(plain(model, x[i]).square().sum(), [*own.values()])
        for name, gradient in zip(own, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_without_inputs_gives_its_bias() -> None:
    base = nn.Linear(5, 4)
    base.in_features, base.weight = 0, nn.Parameter(torch.empty(4, 0))
    adapted = LoRAConfig(rank=1).adapt(base, "x")
    assert torch.equal(adapted(torch.empty(3, 0)), base.bias.expand(3, 4))
