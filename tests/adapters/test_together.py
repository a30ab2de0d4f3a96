"""Several adapted copies of one base at once: each computes and trains as it does alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import inject, shared_copy, together
from adapters.many.terms import FoldedProducts
from tests.adapters.toy import IMAGES, KINDS, Toy, config, move, toy

UNSTACKED = ("loha", "lokr", "lokr of thin", "adaptformer", "adapterplus", "vpt")
STACKED = [kind for kind in KINDS if kind not in UNSTACKED]
LABELS = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(4))


def members(base: Toy, *kinds: str, **options: object) -> list[Toy]:
    """Return a randomly adapted copy of the base for every kind."""
    made = []
    for seed, kind in enumerate(kinds):
        torch.manual_seed(seed)
        made.append(inject(shared_copy(base), config(kind, **options), trainable=("head",)))
        move(made[-1])
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(base: Toy, models: list[Toy]) -> None:
    """Compare logits and gradients together with those of each alone."""
    logits = together(base, models)(IMAGES).chunk(len(models))
    labels = LABELS.chunk(len(models))
    sum(F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True)).backward()
    found = [gradients(model) for model in models]
    for i, model in enumerate(models):
        model.zero_grad()
        alone = model(IMAGES.chunk(len(models))[i])
        torch.testing.assert_close(logits[i], alone, rtol=0, atol=1e-10)
        F.cross_entropy(alone, labels[i]).backward()
        torch.testing.assert_close(found[i], gradients(model), rtol=1e-9, atol=1e-10)
        assert len(found[i]) > 2


@pytest.mark.parametrize("kind", STACKED)
def test_logits_and_gradients_are_those_of_each_alone(kind: str) -> None:
    base = toy()
    check(base, members(base, kind, kind, kind))


def test_one_model_may_be_alone_in_a_joint_pass() -> None:
    base = toy()
    check(base, members(base, "lora"))


def test_methods_ranks_and_targets_train_together() -> None:
    base = toy()
    for first in range(0, len(STACKED) - 3, 4):
        check(base, members(base, *STACKED[first : first + 4]))


def test_a_shift_of_a_linear_without_bias_is_nothing_to_the_others() -> None:
    base = toy()
    for block in base.blocks:
        block.attn.wq.bias = None
    check(base, members(base, "ssf", "lora", "ssf"))


def test_the_gradient_of_the_products_is_that_of_finite_differences() -> None:
    x, a, b = torch.randn(2, 6, 5), torch.randn(2, 3, 5), torch.randn(2, 4, 3)
    tensors = tuple(t.double().requires_grad_() for t in (x, a, b))
    weight = torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(
        lambda x, a, b: FoldedProducts.apply(x, weight, a, b), tensors, atol=1e-10
    )
    every = (tensors[0], weight.requires_grad_(), *tensors[1:])
    assert torch.autograd.gradcheck(FoldedProducts.apply, every, atol=1e-10)


def test_the_base_and_the_members_share_their_weights_and_stay_models() -> None:
    base = toy()
    models = members(base, "lora", "dora")
    joint = together(base, models)
    for model in (*models, joint):
        assert model.embed.weight.data_ptr() == base.embed.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in joint.parameters())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert models[1](IMAGES).shape == (12, 3)


@pytest.mark.parametrize("kind", UNSTACKED)
def test_what_cannot_be_stacked_is_refused(kind: str) -> None:
    base = toy()
    with pytest.raises(
        ValueError, match="cannot be stacked|is a .*, not an nn.Linear or nn.LayerNorm"
    ):
        together(base, members(base, kind))


def test_a_member_of_another_base_is_refused() -> None:
    base, other = toy(), toy(1)
    again = copy.deepcopy(members(base, "lora"))
    assert together(base, again)(IMAGES).shape == (12, 3)
    with pytest.raises(
        ValueError, match=r"member 1 was adapted from the base \w{16}, but this one"
    ):
        together(base, [*again, *members(other, "lora")])


def test_dropout_and_other_trained_modules_are_refused() -> None:
    base = toy()
    with pytest.raises(ValueError, match="dropout draws other numbers together than alone"):
        together(base, members(base, "lora", dropout=0.1))
    model = inject(shared_copy(base), config("lora"), trainable=("head", "embed"))
    with pytest.raises(ValueError, match="train besides the adapter; only 'head' may"):
        together(base, [model])


@pytest.mark.parametrize("head", [nn.Linear(8, 3, bias=False), nn.Linear(8, 4)])
def test_heads_that_are_not_alike_are_refused(head: nn.Linear) -> None:
    base, other = toy(), toy()
    other.head = head.double()
    models = [inject(shared_copy(m), config("lora"), trainable=("head",)) for m in (base, other)]
    for order in (models, models[::-1]):
        with pytest.raises(ValueError, match=r"have heads 'head' of unlike shapes or biases: \("):
            together(base, order)


def test_second_derivatives_are_those_of_each_alone() -> None:
    base = toy()
    some = members(base, "lora", "lora")
    joint, x = together(base, some), IMAGES[:8]

    def penalty(logits: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(logits.pow(3).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    own = [[p for p in m.parameters() if p.requires_grad] for m in some]
    found = penalty(joint(x), [p for ps in own for p in ps])
    expected = [
        g
        for m, part, ps in zip(some, x.chunk(len(some)), own, strict=True)
        for g in penalty(m(part), ps)
    ]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_an_update_is_folded_into_the_weight_in_full_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, plain = [], FoldedProducts.apply
    monkeypatch.setattr(FoldedProducts, "apply", lambda *a: calls.append(1) or plain(*a))
    base = toy()
    some = members(base, "lora", "lora")
    names = [name for name, _ in some[0].named_parameters()]
    together(base, some)(IMAGES)
    assert len(calls) == sum(name.endswith("lora_a") for name in names) > 0


def test_rows_that_do_not_divide_among_the_members_are_refused() -> None:
    base = toy()
    joint = together(base, members(base, "lora", "lora"))
    message = "^3 rows are not equally many for 2 members; give them batches of one size"
    with pytest.raises(ValueError, match=message):
        joint(IMAGES[:3])
