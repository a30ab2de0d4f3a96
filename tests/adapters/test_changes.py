"""What an adapter adds to the base's weights, and in how many directions."""

import pytest
import torch

from adapters import effective_rank, inject, merge, updates
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
    assert list(updates(adapted(kind))) == []


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
