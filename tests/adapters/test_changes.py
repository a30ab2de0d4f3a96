"""What an adapter adds to the base's weights, and in how many directions."""

import pytest
import torch
from torch import nn

from adapters import differences, effective_rank, inject, merge, updates
from tests.adapters.toy import KINDS, MERGED, WRAPPERS, adapted, config, toy


@pytest.mark.parametrize("kind", MERGED)
def test_weight_and_update_are_the_merged_weight(kind: str) -> None:
    found = {name: weight + update for name, weight, update in updates(adapted(kind))}
    merged = merge(adapted(kind))
    assert found
    for name, weight in found.items():
        expected = merged.get_submodule(name).weight
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_changes_no_weight_has_no_update(kind: str) -> None:
    assert [name for name, *_ in updates(adapted(kind))] == ["head"]  # which trains whole


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WRAPPERS])
def test_a_new_adapter_has_changed_nothing(kind: str) -> None:
    for _, weight, update in updates(inject(toy(), config(kind))):
        torch.testing.assert_close(update, torch.zeros_like(weight), rtol=0, atol=1e-12)


def test_the_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64, generator=generator)).Q
        for n in (9, 7)
    )
    for values, expected in (
        ([2, 2, 2, 2], 4.0),
        ([3, 3, 0, 0], 2.0),
        ([1e-30, 0, 0, 0], 1.0),
        ([2, 1, 0, 0], 25 / 17),  # (4 + 1)^2 / (16 + 1)
        ([0, 0, 0, 0], 0.0),
    ):
        update = u @ torch.tensor(values, dtype=torch.float64).diag() @ v.T
        assert effective_rank(update) == pytest.approx(expected)
        assert effective_rank(update.T) == pytest.approx(expected)


def test_only_an_adapted_model_has_updates() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        list(updates(toy()))


def test_what_trains_whole_has_changed_by_its_difference() -> None:
    base = toy()
    model = inject(toy(), config("lora"), trainable=("blocks.0.norm", "head"))
    assert isinstance(model.head.weight, torch.Tensor)
    with torch.no_grad():
        model.get_submodule("blocks.0.norm").weight += 0.5
        model.head.weight *= 2
    found = {name: (weight, update) for name, weight, update in updates(model)}
    torch.testing.assert_close(found["head"], (base.head.weight, base.head.weight))
    norm = base.get_submodule("blocks.0.norm").weight
    torch.testing.assert_close(found["blocks.0.norm"], (norm, torch.full_like(norm, 0.5)))


def test_differences_are_of_every_weight_that_both_models_have() -> None:
    base, model = (nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.GELU()) for _ in range(2))
    base.append(nn.Linear(4, 2))
    model.append(nn.Linear(4, 5))  # other classes
    found = {name: (weight, update) for name, weight, update in differences(model.half(), base)}
    assert [*found] == ["0", "1"]
    for name, (weight, update) in found.items():
        assert weight.dtype == update.dtype == torch.float32
        expected = model.get_submodule(name).weight.float()
        torch.testing.assert_close((weight + update).flatten(), expected.flatten())
    assert found["0"][0].shape == (4, 12)


def test_a_vector_has_no_rank() -> None:
    with pytest.raises(
        ValueError, match=r"^an update of shape \(8,\) is no matrix, and has no rank$"
    ):
        effective_rank(torch.ones(8))
