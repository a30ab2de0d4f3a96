"""Updates: what moves, by how much, and what stops them."""

from typing import Any

import pytest
import torch
from torch import nn

from vitft.optimizers.updates import FiniteSteps, Updates
from vitft.training.plan import Plan

CPU = torch.device("cpu")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 1))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def updates(model: nn.Module, **options: Any) -> Updates:
    plan = {"epochs": 1, "batch_size": 1, "lr": 0.1, "weight_decay": 0.0} | options
    return Updates(model, Plan(**plan))


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_the_first_step_that_is_not_finite_is_known(failing: int) -> None:
    steps = FiniteSteps(CPU)
    steps.restart(2)
    assert steps.first_failed() is None
    for i in range(1, 6):
        steps.update(torch.tensor(torch.inf if i in (failing, 5) else 1.0))
        assert steps.first_failed() == (2 + failing - 1 if i >= failing else None)
    steps.restart(0)
    assert steps.first_failed() is None  # a run that went back to a good state goes on


def test_restarting_counts_anew() -> None:
    steps = FiniteSteps(CPU)
    assert steps.start == 0
    for _ in range(3):
        steps.update(torch.tensor(1.0))
    steps.restart(7)
    steps.update(torch.tensor(1.0))
    steps.update(torch.tensor(torch.nan))
    assert steps.first_failed() == 8


def test_the_norm_is_that_of_all_gradients_together() -> None:
    model = Two()
    made = updates(model)
    model.a.grad, model.b.grad = torch.full((2, 2), 2.0), torch.full((3, 1), -3.0)
    assert made.norm().item() == pytest.approx((4 * 4 + 3 * 9) ** 0.5)
    assert made.reached
    model.b.grad = None  # later, a step may reach less
    assert made.norm().item() == pytest.approx(4.0)


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1.0, 0.2), (99.0, 1.0)])
def test_gradients_are_clipped_to_the_plans_norm_and_dropped_after(
    clip: float, scale: float
) -> None:
    model = Two()
    made = updates(model, clip=clip)
    seen: list[float] = []
    for optimizer in made.optimizers:
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.a.grad[0, 0].item()))
    model.a.grad, model.b.grad = torch.zeros(2, 2), torch.zeros(3, 1)
    model.a.grad[0, 0], model.b.grad[0] = 3.0, 4.0
    made.norm()
    made.step()
    assert seen == pytest.approx([3.0 * scale], rel=1e-5)
    assert model.a.grad is None
    assert model.b.grad is None
    assert model.a[0, 0] < 1
    assert model.frozen.tolist() == [1, 1]


def test_the_plans_rate_decay_and_factors_reach_the_optimizer() -> None:
    made = updates(Two(), lr=0.25, weight_decay=0.5, lr_factors={"b": 4.0})
    groups = made.optimizers[0].param_groups
    assert [(g["lr"], g["weight_decay"], g["lr_factor"]) for g in groups] == [
        (0.25, 0.5, 1.0),
        (0.25, 0.5, 4.0),
    ]
    made.set_lr(0.125)
    assert [g["lr"] for g in groups] == [0.125, 0.5]
    assert list(made.parameters) == ["a", "b"]


def test_a_parameter_that_nothing_computes_with_is_named_with_their_number() -> None:
    model = Two()
    made = updates(model)
    message = (
        "^no gradient reaches 'a' and 1 more parameters: the model computes without them; "
        "leave them out of targets, or freeze them$"
    )
    with pytest.raises(ValueError, match=message):
        made.norm()
    model.a.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="^no gradient reaches 'b' and 0 more parameters: "):
        made.norm()
    assert not made.reached


def test_other_parameters_than_at_first_are_refused_with_the_way_out() -> None:
    model = Two()
    made = updates(model)
    made.check_same(model)
    message = (
        "^the model has other trainable parameters than when the run was made; change the "
        "model first, then make the run$"
    )
    with torch.no_grad():
        model.a += 1  # of other values, but the same
    made.check_same(model)
    for change in (
        lambda: model.a.requires_grad_(False),
        lambda: setattr(model, "a", nn.Parameter(torch.ones(2, 2))),
        lambda: model.frozen.requires_grad_(True),
    ):
        model.__init__()  # type: ignore[misc]
        made = updates(model)
        change()
        with pytest.raises(ValueError, match=message):
            made.check_same(model)


def test_steps_are_counted_in_whole_numbers_on_the_device_that_computes() -> None:
    steps = FiniteSteps(torch.device("meta"))
    assert steps.finite.is_meta
    assert steps.count.is_meta
    assert (steps.finite.dtype, steps.count.dtype) == (torch.bool, torch.int64)
    with torch.device("meta"):
        model = Two()
    assert updates(model).steps.count.is_meta


def test_a_recorded_plan_has_rates_that_a_recording_reads() -> None:
    for recorded in (False, True):
        groups = updates(Two(), recorded=recorded).optimizers[0].param_groups
        assert all(torch.is_tensor(group["lr"]) is recorded for group in groups)
