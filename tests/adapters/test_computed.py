"""Weights that a module computes from others in each pass, by torch's hooks or parametrizations."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from adapters import LoRAConfig, eject, inject, load_adapter, save_adapter, shared_copy
from tests.adapters.toy import Toy, X, fit, toy

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
LORA = LoRAConfig(rank=2, targets=("wq",))
NORMED = {
    "spectral_norm": nn.utils.spectral_norm,
    "new spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "new weight_norm": nn.utils.parametrizations.weight_norm,
}
each_norm = pytest.mark.parametrize("norm", NORMED)


def normed(norm: str, *, ran: bool) -> Toy:
    """Return a toy whose embedding's weight is computed from others in each pass."""
    model = toy()
    model.embed = NORMED[norm](model.embed)
    if ran:
        model(X).sum().backward()
        model.zero_grad()
    return model


@each_norm
@pytest.mark.parametrize("ran", [True, False])
def test_a_frozen_base_stays_what_it_is_or_is_refused_whatever_computes_a_weight(
    norm: str, ran: bool
) -> None:
    model = normed(norm, ran=ran)
    flags = [p.requires_grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if norm.endswith("spectral_norm"):
        with pytest.raises(ValueError, match="^'embed' keeps running statistics, which training c"):
            inject(model, LORA, trainable=("head",))
        assert [p.requires_grad for p in model.parameters()] == flags
        inject(model, LORA, trainable=("head",), to_train=False).eval()(X)
    else:
        fit(inject(model, LORA, trainable=("head",)))
    after = eject(model).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@each_norm
@pytest.mark.parametrize("ran", [True, False])
def test_what_computes_its_weight_trains_and_is_shared(
    norm: str, ran: bool, tmp_path: Path
) -> None:
    model = normed(norm, ran=ran)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shared = shared_copy(model)
    torch.testing.assert_close(shared.eval()(X), model.eval()(X))
    fit(inject(model, LORA, trainable=("embed",)).train())
    assert any(not torch.equal(value, before[k]) for k, value in model.state_dict().items())
    expected = model.eval()(X)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(normed(norm, ran=ran), tmp_path)(X), expected)
    after = eject(model).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    if not norm.endswith("spectral_norm"):
        fit(inject(shared, LORA, trainable=("head",)))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_pruned_base_is_shared_and_its_parts_train() -> None:
    model = toy()
    prune.l1_unstructured(model.head, "weight", 0.5)
    prune.l1_unstructured(model.embed, "weight", 0.5)
    mask = model.head.weight_mask.clone()
    shared = shared_copy(model)
    torch.testing.assert_close(shared(X), model(X))
    fit(inject(shared, LORA, trainable=("head",)))
    assert torch.equal(shared.head.weight != 0, mask != 0)
    assert not torch.equal(shared.head.weight, model.head.weight)
