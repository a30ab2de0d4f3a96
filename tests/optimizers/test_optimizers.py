"""Which parameters an optimizer takes, at which rate; schedules and what is refused in words."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from vitft.optimizers.build import build_optimizers, decays, lr_factor, owned_parameters, set_lr
from vitft.optimizers.muon import Muon, orthogonalise


class Net(nn.Module):
    """A matrix in a numbered block, one outside, a kernel, a bias, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 4), nn.Conv2d(2, 2, 2)])
        self.head = nn.Linear(4, 2)
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def groups_of(model: nn.Module, **options: Any) -> dict[str, tuple[str, Any]]:
    """Return the optimizer's class and the group's options by the names of the parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, **{"lr": 0.1, "weight_decay": 0.5} | options):
        for group in optimizer.param_groups:
            for p in group["params"]:
                own = tuple(group[key] for key in ("lr", "weight_decay", "lr_factor"))
                assert type(own[0]) is float  # a tensor only where a step is recorded
                found[names[id(p)]] = (type(optimizer).__name__, own)
    return found


def test_matrices_in_blocks_are_muons_and_matrices_and_kernels_decay() -> None:
    plain, decay = ("AdamW", (0.1, 0.0, 1.0)), ("AdamW", (0.1, 0.5, 1.0))
    expected = {
        "blocks.0.weight": decay,
        "blocks.0.bias": plain,
        "blocks.1.weight": decay,
        "blocks.1.bias": plain,
        "head.weight": decay,
        "head.bias": plain,
        "token": plain,
    }
    assert groups_of(Net(), name="adamw") == expected
    expected["blocks.0.weight"] = ("Muon", (0.1, 0.5, 1.0))
    assert groups_of(Net(), name="muon") == expected


def test_adam_is_the_articles() -> None:
    found = groups_of(Net(), name="adam", weight_decay=0.0, lr_factors={"bias": 3.0})
    assert found["head.weight"] == ("Adam", (0.1, 0.0, 1.0))
    assert found["head.bias"] == ("Adam", (0.1, 0.0, 3.0))


def test_a_factor_is_by_a_module_or_by_the_last_part_of_a_name() -> None:
    found = groups_of(Net(), name="adamw", lr_factors={"bias": 3.0, "token": 2.0, "head": 9.0})
    factors = {name: own[1][2] for name, own in found.items()}
    assert factors == {
        name: (3.0 if name.endswith("bias") else 2.0 if name == "token" else 1.0)
        * (9.0 if name.startswith("head.") else 1.0)
        for name in found
    }


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_optimizers_are_fused_and_capturable_where_recorded(name: str) -> None:
    for recorded in (False, True):
        options: dict[str, Any] = {"name": name, "lr": 0.1, "weight_decay": 0.0}
        for optimizer in build_optimizers(Net(), **options, recorded=recorded):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert all(torch.is_tensor(rate) is recorded for rate in rates)
            assert [float(rate) for rate in rates] == pytest.approx([0.1] * len(rates))
            if not isinstance(optimizer, Muon):
                assert optimizer.defaults["fused"] is True
                assert optimizer.defaults["capturable"] is recorded
            assert optimizer.defaults["lr"] == 0.1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "sgd"}, "unknown optimizer 'sgd'; choose from adamw, adam, muon"),
    (
        {"name": "adam"},
        "adam has no weight_decay=0.5; use --optimizer adamw, or --weight-decay 0",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_no_optimizer_does_is_refused_with_the_way_out(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_optimizers(Net(), **{"lr": 0.1, "weight_decay": 0.5} | options)


def test_a_model_without_what_trains_is_refused() -> None:
    with pytest.raises(ValueError, match="^nothing to train: no parameter requires a gradient$"):
        build_optimizers(Net().requires_grad_(False), name="adamw", lr=1.0, weight_decay=0.0)
    model = Net()
    model.blocks.requires_grad_(False)
    message = "^optimizer muon is for the matrices of blocks, and none trains; use adamw$"
    with pytest.raises(ValueError, match=message):
        build_optimizers(model, name="muon", lr=1.0, weight_decay=0.0)


def test_every_parameter_comes_with_the_module_that_holds_it() -> None:
    model = Net()
    found = {name: module for name, _, module in owned_parameters(model)}
    assert found["token"] is model
    assert found["blocks.0.bias"] is model.blocks[0]
    assert [(name, p) for name, p, _ in owned_parameters(model)] == [*model.named_parameters()]


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5])
def test_what_decays_is_two_or_four_dimensional_and_no_vector(ndim: int) -> None:
    module = nn.Module()
    module.x = nn.Parameter(torch.ones([2] * ndim))
    assert decays(module, "x") is (ndim in (2, 4))
    module.vectors = ("y",)
    assert decays(module, "x") is (ndim in (2, 4))
    module.vectors = ("x",)
    assert not decays(module, "x")


def test_rates_are_set_with_the_factors_of_their_groups() -> None:
    for recorded in (False, True):
        factors = {"bias": 3.0}
        options: dict[str, Any] = {"lr": 9.0, "weight_decay": 0.0, "lr_factors": factors}
        made = build_optimizers(Net(), name="muon", recorded=recorded, **options)
        set_lr(made, 0.5)
        for optimizer in made:
            for group in optimizer.param_groups:
                assert float(group["lr"]) == 0.5 * group["lr_factor"]


SHAPES = {
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_a_schedule_rises_linearly_then_falls_over_what_is_left(
    schedule: str, warmup: float
) -> None:
    for progress in (0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.99, 1.0):
        if progress < warmup:
            expected = progress / warmup
        elif warmup < 1:
            expected = SHAPES[schedule]((progress - warmup) / (1 - warmup))
        else:
            expected = 1.0
        assert lr_factor(schedule, progress, warmup=warmup) == pytest.approx(expected)


def test_multistep_divides_by_ten_after_80_and_130_of_150_epochs() -> None:
    epochs = range(150)
    found = [lr_factor("multistep", epoch / 150, warmup=0.0) for epoch in epochs]
    assert found == pytest.approx([1.0] * 80 + [0.1] * 50 + [0.01] * 20)
    found = [lr_factor("multistep", epoch / 150, warmup=0.0) for epoch in (79.99, 129.99)]
    assert found == pytest.approx([1.0, 0.1])
    assert lr_factor("multistep", 0.05, warmup=0.1) == pytest.approx(0.5)
    message = "^unknown schedule 'x'; choose from cosine, linear, multistep, constant$"
    with pytest.raises(ValueError, match=message):
        lr_factor("x", 0.0, warmup=0.0)


def test_muon_keeps_its_defaults_the_direction_of_momentum_and_the_dtype() -> None:
    matrix = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    optimizer = Muon([matrix], lr=0.1)
    expected = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.95, "n_iterations": 5}
    assert optimizer.defaults == expected
    assert orthogonalise(matrix.detach()[None], 5).dtype == torch.float64
    assert orthogonalise(torch.zeros(1, 2, 2), 5).abs().max() == 0  # no division by zero
    assert optimizer.step() is None


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_muons_step_is_that_of_its_formula(shape: tuple[int, int]) -> None:
    matrix = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradient, start = torch.randn(shape, dtype=torch.float64), matrix.detach().clone()
    optimizer = Muon([matrix], lr=0.1, weight_decay=0.5, momentum=0.9)
    mean = torch.zeros(shape, dtype=torch.float64)
    for _ in range(2):
        matrix.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        wide = 0.1 * gradient + 0.9 * mean
        wide = wide if shape[0] <= shape[1] else wide.T
        found = orthogonalise(wide[None], 5)[0]
        found = found if shape[0] <= shape[1] else found.T
        start = start * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(shape) ** 0.5 * found
    torch.testing.assert_close(matrix.detach(), start)


def test_a_tiny_matrix_is_not_divided_by_zero() -> None:
    for size in (1e-7, 1e-8, 0.0):
        assert orthogonalise(torch.full((1, 1, 1), size), 5).isfinite().all()
