"""The adapter of a full fine-tune: what it keeps, by how much, and what it refuses to leave out."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS, diff
from tests.adapters.toy import Toy, X, toy


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def tuned(*changed: str, by: float = 0.1) -> Toy:
    """Return a toy of which these parameters, and the head, were moved at random."""
    model = toy()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in changed or name.startswith("head"):
                p.add_(torch.randn_like(p), alpha=by)
    return model


WQ, W0 = "blocks.0.attn.wq.weight", "blocks.1.ffn.0.weight"
NORM = ("blocks.0.norm.weight", "blocks.0.norm.bias")


def test_a_full_rank_keeps_all_and_computes_what_the_tuned_model_does() -> None:
    other = tuned(WQ, W0, *NORM)
    other.classes, other.preprocessing = ("x", "y", "z"), {"image_size": 8}
    base = toy()
    base.preprocessing = {"image_size": 7}
    model, kept = diff(base, other)
    torch.testing.assert_close(model.eval()(X), other(X), rtol=0, atol=1e-8)
    assert kept == pytest.approx(
        {"blocks.0.attn.wq": 1.0, "blocks.1.ffn.0": 1.0, "blocks.0.norm": 1.0, "all": 1.0}
    )
    assert model.classes == ("x", "y", "z")
    assert model.preprocessing == {"image_size": 8}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{n}.lora_{ab}" for n in ("blocks.0.attn.wq", "blocks.1.ffn.0") for ab in "ab"}
    assert trains == {*own, *NORM, "head.weight", "head.bias"}


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_a_smaller_rank_keeps_the_largest_directions(rank: int) -> None:
    other = tuned(WQ, W0, *NORM)
    model, kept = diff(toy(), other, rank=rank)
    energies, whole = [], []
    for name in (WQ, W0):
        change = other.get_parameter(name) - toy().get_parameter(name)
        values = torch.linalg.svdvals(change.detach()).square()
        share = (values[:rank].sum() / values.sum()).item()
        assert kept[name.removesuffix(".weight")] == pytest.approx(share)
        energies.append(share * values.sum().item())
        whole.append(values.sum().item())
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert len(layer.lora_a) == min(rank, 8)
    for name in NORM:
        change = other.get_parameter(name) - toy().get_parameter(name)
        energies.append(change.square().sum().item())
        whole.append(energies[-1])
    assert kept["all"] == pytest.approx(sum(energies) / sum(whole))


def test_the_default_rank_is_loras() -> None:
    base, other = nn.ModuleDict(), nn.ModuleDict()
    for model in (base, other):
        torch.manual_seed(0)
        model["a"], model["head"] = nn.Linear(20, 20), nn.Linear(20, 2)
    nn.init.normal_(other["a"].weight)
    model, _ = diff(base, other)
    assert len(model["a"].lora_a) == METHODS["lora"](targets=("a",)).rank == 8


BIASES = [f"blocks.0.attn.{w}.bias" for w in ("wk", "wo", "wq", "wv")]


def test_what_no_adapter_holds_is_named_up_to_four_and_left_out_only_when_asked() -> None:
    rest = "changed, which no adapter holds; lossy=True leaves them out"
    with refused(f"{', '.join(BIASES)} {rest}"):
        diff(toy(), tuned(WQ, *BIASES))
    more = [*BIASES, "blocks.1.attn.wq.bias"]
    with refused(f"{', '.join(more[:4])}, ... {rest}"):
        diff(toy(), tuned(WQ, *more))
    other = tuned(WQ, *NORM, BIASES[0])
    model, kept = diff(toy(), other, lossy=True)
    assert kept[BIASES[0]] == 0.0
    assert kept["blocks.0.norm"] == 1.0
    changes = {
        name: (p - toy().get_parameter(name)).square().sum().item()
        for name, p in other.named_parameters()
        if not name.startswith("head")
    }
    assert kept["all"] == pytest.approx(1 - changes[BIASES[0]] / sum(changes.values()))
    assert torch.equal(model.blocks[0].attn.wq.bias, toy().blocks[0].attn.wq.bias)


def test_models_that_do_not_differ_in_a_linear_are_refused() -> None:
    for other in (toy(), tuned(), tuned(*NORM)):
        with refused("no linear differs between the two models"):
            diff(toy(), other)


class Twins(nn.Module):
    """Two linears of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.register_buffer("gain", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gain * self.b(self.a(x).tanh()))


def test_tied_linears_both_get_the_update_and_a_changed_buffer_is_not_passed_over() -> None:
    base, x = Twins(), torch.randn(3, 4)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.a.weight += torch.randn(4, 4)
    model, kept = diff(copy.deepcopy(base), other)
    assert kept == pytest.approx({"a": 1.0, "b": 1.0, "all": 1.0})
    torch.testing.assert_close(model.eval()(x), other(x))
    other.gain += 1
    with refused("gain changed, which no adapter holds; lossy=True leaves them out"):
        diff(copy.deepcopy(base), other)
    assert diff(base, other, lossy=True)[1]["gain"] == 0.0
