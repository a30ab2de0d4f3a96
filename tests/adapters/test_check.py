"""The check by a pass: what it hands on, what it looks at, and what it says."""

import re
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters.check import _devices


class Mixed(nn.Module):
    """Calls only the linears that it is told to, with what it is given by name."""

    def __init__(self, n: int = 9) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(n))
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor, *, calls: tuple[int, ...], scale: float = 1.0) -> Tensor:
        self.seen.append({"calls": calls, "scale": scale, "training": self.training})
        for i in calls:
            x = self.linears[i](x=x) * scale
        return x


def model(n: int = 9) -> Mixed:
    return adapters.inject(Mixed(n), adapters.LoRAConfig(targets=(r"linears\.\d",), rank=1))


def test_a_pass_gets_all_that_it_is_given_in_evaluation_mode() -> None:
    made = model(2)
    adapters.check(made, torch.ones(1, 4), calls=(0, 1), scale=2.0)
    assert made.seen == [{"calls": (0, 1), "scale": 2.0, "training": False}]
    assert made.training


@pytest.mark.parametrize(("n_missed", "more"), [(1, ""), (5, ""), (6, ", ...")])
def test_up_to_five_that_were_not_called_are_named(n_missed: int, more: str) -> None:
    made = model()
    missed = ", ".join(f"linears.{i}" for i in range(min(n_missed, 5)))
    message = (
        f"{missed}{more}: never called; ModuleList reads its weight directly or does without it; "
        "leave it out of targets"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapters.check(made, torch.ones(1, 4), calls=range(n_missed, 9))
    assert not any("forward" in vars(layer) for layer in made.linears)


def test_a_layer_computes_in_the_check_what_it_does_without() -> None:
    made, x = model(2), torch.randn(3, 4)
    found: list[Tensor] = []
    made.register_forward_hook(lambda *call: found.append(call[2]))
    adapters.check(made, x, calls=(0, 1))
    assert torch.equal(found[0], made(x, calls=(0, 1)))


def test_random_numbers_are_kept_on_the_devices_that_hold_parameters() -> None:
    devices = ["cpu", "cuda:1", "cuda", "cuda:1", "meta"]
    fake = SimpleNamespace(
        parameters=lambda: [SimpleNamespace(device=torch.device(name)) for name in devices]
    )
    assert _devices(fake) == [0, 1]  # type: ignore[arg-type]


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor, n: int) -> Tensor:
        for linear in self.linears[:n]:
            x = linear(x)
        return x


def test_a_trained_list_is_called_by_its_parts_and_a_forward_of_its_own_stays() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].forward = MethodType(lambda self, x: 3 * (x @ self.weight), base[1])
    made, x = adapters.inject(base, None, trainable=("1",)), torch.ones(1, 4)
    expected = made(x)
    adapters.check(made, x)
    assert torch.equal(made(x), expected)
    made = adapters.inject(Listed(), None, trainable=("linears",))
    adapters.check(made, x, 1)
    with pytest.raises(ValueError, match="^linears: never called"):
        adapters.check(made, x, 0)
    assert not any("forward" in vars(part) for part in made.modules())


class Twice(nn.Module):
    """Calls a linear, and may read its weight too."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.inner, self.reads = nn.Linear(4, 4), reads
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.to(self.inner.weight.dtype))
        return self.last(nn.functional.linear(y, self.inner.weight) if self.reads else y)


def test_a_layer_that_is_called_and_read_too_is_named() -> None:
    x = torch.ones(1, 4)
    for reads in (False, True):
        made = adapters.inject(Twice(reads), adapters.LoRAConfig(targets=("inner", "last")))
        before, expected = dict(made.named_parameters()), made(x)
        if reads:
            with pytest.raises(ValueError, match="^inner: called, but Twice reads its weight too"):
                adapters.check(made, x)
        else:
            adapters.check(made, x)
        assert dict(made.named_parameters()) == before
        assert torch.equal(made(x), expected)
        assert "forward" not in vars(made.inner)


class Reads(nn.Module):
    """Reads what trains: a weight, a list of parameters, and a weight's dtype."""

    def __init__(self, gives: Any = lambda y: y) -> None:
        super().__init__()
        self.body, self.head, self.gives = nn.Linear(4, 4), nn.Linear(4, 4), gives
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(4))])
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).to(self.unused.weight.dtype) + self.prompts[0]
        return self.gives(nn.functional.linear(x, self.head.weight))


@dataclass
class Output:
    logits: Tensor
    n: int = 3


def cyclic(y: Tensor) -> list[Any]:
    made: list[Any] = [y]
    made.append(made)
    return made


@pytest.mark.parametrize(
    "gives",
    [
        lambda y: y,
        lambda y: {"logits": (y.argmax(), [y])},
        Output,
        lambda y: SimpleNamespace(logits=y),
        cyclic,
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_trained_module_that_is_only_read_is_reached_by_gradients(
    gives: Any, training: bool
) -> None:
    own, x = adapters.LoRAConfig(targets=("body",), rank=1), torch.ones(1, 4)
    made = adapters.inject(Reads(gives), own, trainable=("head", "prompts")).train(training)
    for flags in (True, False):
        made.requires_grad_(flags)
        adapters.check(made, x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                adapters.check(torch.nn.DataParallel(made), x)
        assert all(p.requires_grad is flags and p.grad is None for p in made.parameters())
        assert all(module.training is training for module in made.modules())


def test_a_trained_module_that_no_gradient_reaches_is_named() -> None:
    x = torch.ones(1, 4)
    made = adapters.inject(Reads(), None, trainable=("unused", "head"))
    with pytest.raises(ValueError, match="^unused: never called"):
        adapters.check(made, x)
    made = adapters.inject(Reads(lambda y: y.argmax()), None, trainable=("head",))
    with pytest.raises(ValueError, match="^head: never called"):
        adapters.check(made, x)
    assert all(p.requires_grad for p in made.head.parameters())
