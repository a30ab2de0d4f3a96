"""Every method in 16 bits, after operations in place, under torch.func, and exported."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from tests.adapters.toy import X, adapted, config, toy
from tests.shared import some

each_method = pytest.mark.parametrize("kind", adapters.METHODS)


@each_method
def test_adapters_of_a_16_bit_base_are_float32_and_every_number_moves(kind: str) -> None:
    model = adapters.inject(toy().bfloat16(), config(kind), trainable=("head",))
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and "head" not in n}
    assert {p.dtype for p in own.values()} == {torch.float32}
    start = {name: p.detach().clone() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        F.cross_entropy(model(X.bfloat16()).float(), torch.tensor([0, 1])).backward()
        with torch.no_grad():  # so that every number has a gradient, also beside a factor of zeros
            for p in own.values():
                p.grad = torch.where(p.grad == 0, 1.0, p.grad)
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != start[name]).all() for name, p in own.items())


@each_method
def test_a_16_bit_base_gives_nearly_what_float32_does(kind: str) -> None:
    low = adapters.inject(toy().bfloat16(), config(kind), trainable=("head",))
    full = adapters.inject(toy().bfloat16().float(), config(kind), trainable=("head",))
    with torch.no_grad():
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
            q.copy_(p)
    y = low(X.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), full(X.float()), rtol=0.05, atol=0.08)


@each_method
def test_operations_in_place_after_a_layer_train(kind: str) -> None:
    model = toy()
    for block in model.blocks:
        block.ffn[1] = nn.ReLU(inplace=True)
    model = adapters.inject(model, config(kind), trainable=("head",)).train()
    many = torch.randn(5, *X.shape[1:], dtype=X.dtype)
    y = model(many)
    y += 1
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@each_method
def test_functional_transforms_work(kind: str) -> None:
    model = adapted(kind).eval()
    many = torch.randn(20, *X.shape[1:], dtype=X.dtype)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    gradient = torch.func.grad(loss)(many)
    x = many.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0])
    _, tangent = torch.func.jvp(loss, (many,), (many,))
    torch.testing.assert_close(tangent, (gradient * many).sum())
    own = {n: p.detach() for n, p in model.named_parameters()}
    called = torch.func.functional_call(model, own, (many,))
    torch.testing.assert_close(called, model(many))


@pytest.mark.parametrize("kind", some([*adapters.METHODS], 12))
def test_a_free_batch_is_exported(kind: str) -> None:
    model = adapted(kind).eval()
    some = torch.randn(7, *X.shape[1:], dtype=X.dtype)
    program = torch.export.export(model, (some,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for n in (2, 5, 30):
        x = torch.randn(n, *X.shape[1:], dtype=X.dtype)
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-10)
