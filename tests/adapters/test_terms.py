"""The function of banks and joint passes beside its formula, one adapter after the other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import disabled, inject, shared_copy, together
from adapters.many.rows import Rows
from adapters.many.terms import FoldedProducts, linear, norm, products, scaled
from adapters.many.together import Joint, JointHead
from tests.adapters.toy import X, config, move, toy

K, T, R, I, O = 3, 7, 2, 5, 4  # noqa: E741 (the legend's)
SHAPES = {
    "a": (K, R, I),
    "b": (K, O, R),
    "gain": (K, 1, O),
    "in_gain": (K, 1, I),
    "bias": (K, 1, O),
}
OTHERS = [rest for n in range(4) for rest in itertools.combinations(("gain", "in_gain", "bias"), n)]
SETS = [low + rest for low in ((), ("a", "b")) for rest in OTHERS]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def formula(x: Tensor, base: nn.Linear, terms: dict[str, Tensor]) -> Tensor:
    """Return what the docstring of `linear` says, for each of K."""
    rows = []
    for i, one in enumerate(x):
        term = {name: tensor[i] for name, tensor in terms.items()}
        inner = one * term.get("in_gain", 1)
        y = inner @ base.weight.T
        if "a" in term:
            y = y + inner @ term["a"].T @ term["b"].T
        y = y * term.get("gain", 1)
        bias = term.get("bias", base.bias)
        rows.append(y if bias is None else y + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("names", SETS, ids=",".join)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_a_linear_is_its_formula_with_any_parts(
    names: tuple[str, ...], has_bias: bool, fold: bool
) -> None:
    base, x = nn.Linear(I, O, bias=has_bias).double(), random(K, T, I)
    terms = {name: random(*SHAPES[name]) for name in names}
    before = {name: tensor.clone() for name, tensor in terms.items()}
    found = linear(x, base, terms, fold=fold)
    torch.testing.assert_close(found, formula(x, base, terms), rtol=0, atol=1e-12)
    assert all(torch.equal(terms[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("names", [(), ("gain",), ("bias",), ("gain", "bias")], ids=",".join)
def test_a_norm_is_its_formula_with_any_parts(names: tuple[str, ...]) -> None:
    base, x = nn.LayerNorm(O, eps=0.3).double(), random(K, 2, T, O)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    terms = {name: random(K, 1, 1, O) for name in names}
    plain = F.layer_norm(x, (O,), None, None, 0.3)
    expected = plain * terms.get("gain", base.weight) + terms.get("bias", base.bias)
    torch.testing.assert_close(norm(x, base, terms), expected)
    bare = nn.LayerNorm(O, bias=False).double()
    plain = F.layer_norm(x, (O,))
    torch.testing.assert_close(norm(x, bare, {}), plain)
    without = nn.LayerNorm(O, elementwise_affine=False).double()
    torch.testing.assert_close(norm(x, without, {}), plain)


def test_parts_in_float32_are_taken_in_the_dtype_of_what_they_meet() -> None:
    base, x = nn.Linear(I, O).bfloat16(), random(K, T, I, dtype=torch.bfloat16)
    terms = {name: random(*shape, dtype=torch.float32) for name, shape in SHAPES.items()}
    for fold in (True, False):  # 16 bits cannot hold the sum, so it is never folded
        found = linear(x, base, terms, fold=fold)
        assert found.dtype == torch.bfloat16
        expected = formula(x.double(), base.double(), {n: p.double() for n, p in terms.items()})
        base.bfloat16()
        torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.2)
    layer = nn.LayerNorm(O).bfloat16()
    y = random(K, T, O, dtype=torch.bfloat16)
    assert norm(y, layer, {"gain": terms["gain"], "bias": terms["bias"]}).dtype == torch.bfloat16
    assert scaled(y, None) is y
    assert scaled(y, terms["gain"]).dtype == torch.bfloat16


def test_products_are_those_of_each_with_and_without_gradients() -> None:
    x, weights = random(K, T, I).requires_grad_(), random(K, I, O)
    expected = torch.stack([a @ b for a, b in zip(x, weights, strict=True)])
    torch.testing.assert_close(products(x, weights), expected)
    (gradient,) = torch.autograd.grad(products(x, weights).sum(), [x])
    torch.testing.assert_close(gradient, weights.sum(2)[:, None].expand(K, T, I))
    with torch.no_grad():
        found = products(x, weights)
    torch.testing.assert_close(found, expected)
    assert found.shape == (K, T, O)
    assert products(x.to("meta"), weights.to("meta")).shape == (K, T, O)


def test_the_folded_product_gives_only_the_gradients_that_are_wanted() -> None:
    weight, a, b = random(O, I), random(K, R, I), random(K, O, R)
    for wanted in (True, False):
        x = random(K, T, I).requires_grad_(wanted)
        tensors = [t.clone().requires_grad_() for t in (a, b)]
        y = FoldedProducts.apply(x, weight, *tensors)
        torch.testing.assert_close(y, x @ (weight + b @ a).mT)
        direction = random(K, T, O)
        y.backward(direction)
        plain = x.detach() @ (weight + tensors[1] @ tensors[0]).mT
        expected = torch.autograd.grad(plain, tensors, direction)
        for found, other in zip(tensors, expected, strict=True):
            torch.testing.assert_close(found.grad, other)
        if wanted:
            torch.testing.assert_close(x.grad, direction @ (weight + b @ a))
        assert weight.grad is None


def test_members_that_lack_a_part_have_the_bases() -> None:
    base = toy()
    for block in base.blocks:
        nn.init.normal_(block.norm.weight)
        nn.init.normal_(block.norm.bias)
    kinds = ("lora", "ssf", "ia3", "bitfit", "norm", "dora", "ia3 of inputs")
    models = []
    for kind in kinds:
        models.append(inject(shared_copy(base), config(kind), trainable=("head",)))
        move(models[-1])
    models.append(inject(shared_copy(base), None, trainable=("head",)))
    batch = torch.cat([X] * len(models))
    found = together(base, models)(batch).chunk(len(models))
    for one, model in zip(found, models, strict=True):
        torch.testing.assert_close(one, model(X), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 8), (6, 2, 3, 8)])
def test_joint_layers_keep_the_shape_of_a_batch(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    lin, layer = nn.Linear(8, 5).double(), nn.LayerNorm(8).double()
    torch.testing.assert_close(Joint(lin, [lin, lin], Rows(), "x")(x), lin(x))
    torch.testing.assert_close(Joint(layer, [layer] * 3, Rows(), "x")(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_every_member_has_its_own_head(bias: bool) -> None:
    heads = [nn.Linear(8, 3, bias=bias).double() for _ in range(3)]
    joint, x = JointHead(heads, Rows(), "x"), random(6, 8)
    expected = torch.cat([head(term) for head, term in zip(heads, x.chunk(3), strict=True)])
    torch.testing.assert_close(joint(x), expected)
    assert not list(joint.parameters())


def test_a_joint_model_is_in_the_mode_of_its_members_and_leaves_the_base() -> None:
    base = toy().eval()
    for mode in (True, False):
        model = inject(shared_copy(base), config("lora"), trainable=("head",)).train(mode)
        assert together(base, [model]).training is mode
    assert not base.training
    assert all(p.requires_grad for p in base.parameters())


def test_what_cannot_train_together_is_refused_in_a_whole_sentence() -> None:
    base = toy()
    model = inject(shared_copy(base), config("lora"), trainable=("head", "embed"))
    message = r"^\['head', 'embed'\] train besides the adapter; only 'head' may$"
    with pytest.raises(ValueError, match=message):
        together(base, [model])
    with pytest.raises(ValueError, match="only 'embed' may$"):
        together(base, [model], head="embed")
    model = inject(shared_copy(base), config("lora", dropout=0.5), trainable=("head",))
    message = "^dropout draws other numbers together than alone; leave it out$"
    with pytest.raises(ValueError, match=message):
        together(base, [model])
    with disabled(model), pytest.raises(ValueError, match="switched off"):
        together(base, [model])
