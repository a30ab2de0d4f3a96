"""Random states: kept apart, and found where a model draws."""

import pytest
import torch
from torch import Tensor, nn

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation.features import n_frozen
from vitft.training.draws import (
    first_varying_stage,
    random_state,
    seeded_state,
    set_random_state,
)

CPU = torch.device("cpu")


def test_a_state_that_is_put_back_draws_the_same_again() -> None:
    state = random_state(CPU)
    assert len(state) == 1
    first = torch.rand(3)
    assert not torch.equal(torch.rand(3), first)
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(3), first)


def test_the_state_of_metal_is_metals(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", set_to.append)
    state = random_state(torch.device("mps"))
    assert [len(state), state[1].item()] == [2, 7]
    set_random_state(state, torch.device("mps"))
    assert set_to == [state[1]]


def test_a_seeds_state_is_that_of_manual_seed_and_the_present_one_stays() -> None:
    before = torch.get_rng_state()
    made = seeded_state(5, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), made[0])


class Seeing(nn.Module):
    """Says what it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        self.seen.append(x)
        return self.inner(x) if n is None else self.inner(x, n=n)


@pytest.mark.parametrize("where", range(5))
def test_the_first_stage_that_draws_is_found_and_nothing_changes(where: int) -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0)).double().eval()
    dropped = nn.Sequential
    if where == 0:
        model.patch_embed = dropped(model.patch_embed, nn.Dropout(0.5))
    elif where < 3:
        model.blocks[where - 1].ffn = dropped(model.blocks[where - 1].ffn, nn.Dropout(0.5))
    elif where == 3:
        model.norm = dropped(model.norm, nn.Dropout(0.5))
    model.blocks[0] = Seeing(model.blocks[0])
    model.blocks[0].inner.train()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert first_varying_stage(model) == (where if where < 4 else 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert not any(x.requires_grad for x in model.blocks[0].seen)
    assert len(model.blocks[0].seen) == (where > 0)


def test_a_model_of_any_channels_size_and_device_is_looked_at() -> None:
    model = VisionTransformer(ViTConfig(**TINY | {"n_channels": 1}, dropout=0.0)).bfloat16()
    model.resize(12)
    assert first_varying_stage(model) == 5
    with torch.device("meta"):
        assert first_varying_stage(VisionTransformer(ViTConfig(**TINY, dropout=0.0))) == 5


def test_on_cuda_the_devices_own_numbers_belong_to_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, own = torch.device("cuda", 1), torch.arange(16, dtype=torch.uint8)
    put: list[tuple[Tensor, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: own if device == cuda else 0)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *call: put.append(call))
    cpu, found = random_state(cuda)
    assert torch.equal(cpu, torch.get_rng_state())
    assert found is own
    torch.rand(1)
    set_random_state([cpu, own], cuda)
    assert torch.equal(cpu, torch.get_rng_state())
    assert put == [(own, cuda)]


class Normed(nn.Module):
    """Batch norm of what another module gives, by tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(TINY["dim"], affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


def test_a_stage_that_changes_a_buffer_varies_and_is_left_as_it_was() -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0))
    model.requires_grad_(False)
    model.blocks[1].norm1 = norm = Normed(model.blocks[1].norm1)
    assert first_varying_stage(model) == n_frozen(model) == 2
    assert not norm.norm.running_mean.any()
    assert norm.norm.num_batches_tracked == 0
