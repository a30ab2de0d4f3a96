"""A run's saved state: what goes in comes out, and what does not fit is refused whole."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitft.files import read_tensors, write_tensors
from vitft.training.draws import random_state
from vitft.training.state import load_state, save_state

CPU = torch.device("cpu")


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    made[1].requires_grad_(False)
    return made


def optimizers(of: nn.Module) -> list[torch.optim.Optimizer]:
    """Return two optimizers that have taken a step."""
    made = [torch.optim.AdamW(of[0].parameters(), lr=0.1), torch.optim.Adam(of[2].parameters())]
    for p in of.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    for optimizer in made:
        optimizer.step()
    return made


def tensors_of(made: list[torch.optim.Optimizer]) -> list[Tensor]:
    return [
        value
        for optimizer in made
        for values in optimizer.state_dict()["state"].values()
        for _, value in sorted(values.items())
    ]


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    one, other = model(), model()
    ones, others = optimizers(one), optimizers(other)
    others[0].param_groups[0]["lr"] = 0.7
    draws = random_state(CPU)
    torch.rand(1)
    save_state(tmp_path / "s", one, ones, draws, {"epoch": 3, "belongs": ["a"]}, {})
    frozen = other[1].weight.clone()
    progress, found, _ = load_state(tmp_path / "s", other, others, CPU)
    assert progress == {"epoch": 3, "belongs": ["a"]}
    assert len(found) == 1
    assert torch.equal(found[0], draws[0])
    for i in (0, 2):
        assert torch.equal(one[i].weight, other[i].weight)
        assert torch.equal(one[i].bias, other[i].bias)
    assert torch.equal(other[1].weight, frozen)
    pairs = zip(tensors_of(ones), tensors_of(others), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert others[0].param_groups[0]["lr"] == 0.7  # options are the plan's, not the file's
    assert other[0].weight.requires_grad


Change = Callable[[dict[str, Tensor]], Any]
FOREIGN: list[Change] = [
    lambda t: t.pop("model.0.weight"),
    lambda t: t.update({"model.9.weight": torch.ones(1)}),
    lambda t: t.update({"model.0.weight": torch.ones(3, 9)}),
]
BROKEN: list[tuple[Change, str]] = [
    (lambda t: t.pop("random.cpu"), "'random.cpu'"),
    (lambda t: t.update({"random.cpu": t["random.cpu"][:9]}), "its random state is of another"),
    (lambda t: t.update({"random.cpu": t["random.cpu"].int()}), "its random state is of another"),
    (lambda t: t.pop("optimizer.0.1.exp_avg"), "the optimizer state of a parameter is incomplete"),
    (lambda t: t.pop("optimizer.1.0.step"), "the optimizer state of a parameter is incomplete"),
    (lambda t: t.update({"optimizer.0.x.step": torch.ones(1)}), "invalid literal"),
]


def changed(folder: Path, change: Change) -> tuple[Path, nn.Module]:
    """Return a saved state with a change, and the model that it was of."""
    made, path = model(), folder / "state.safetensors"
    save_state(path, made, optimizers(made), random_state(CPU), {"epoch": 3}, {})
    tensors, progress = read_tensors(path)
    change(tensors)
    progress.pop("checksum")  # of what it was
    write_tensors(path, tensors, progress)
    return path, made


def test_a_state_changed_since_is_refused(tmp_path: Path) -> None:
    made, path = model(), tmp_path / "state.safetensors"
    save_state(path, made, optimizers(made), random_state(CPU), {"epoch": 3}, {})
    load_state(path, made, optimizers(made), CPU)
    tensors, progress = read_tensors(path)
    no_checksum = {"epoch": 2, "best": None}  # of no version
    for others in (
        (tensors, no_checksum),
        (tensors, progress | {"epoch": 2}),
        (tensors | {"model.0.bias": tensors["model.0.bias"] + 1}, progress),
    ):
        write_tensors(path, *others)
        with pytest.raises(ValueError, match=r"has been changed since it was saved; start again"):
            load_state(path, made, optimizers(made), CPU)


@pytest.mark.parametrize("change", FOREIGN)
def test_a_state_of_another_model_is_refused(tmp_path: Path, change: Change) -> None:
    path, made = changed(tmp_path, change)
    message = f"^{re.escape(str(path))} belongs to another model; choose another --out$"
    with pytest.raises(ValueError, match=message):
        load_state(path, made, optimizers(made), CPU)


@pytest.mark.parametrize(("change", "why"), BROKEN)
def test_a_broken_state_is_refused_and_leaves_the_model(
    tmp_path: Path, change: Change, why: str
) -> None:
    path, made = changed(tmp_path, change)
    other = model()
    others = optimizers(other)
    before = [p.clone() for p in other.parameters()]
    message = rf"^{re.escape(str(path))} is broken \({why}.*\); start again with --overwrite$"
    with pytest.raises(ValueError, match=message):
        load_state(path, other, others, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_state_from_cuda_goes_on_on_a_cpu(tmp_path: Path) -> None:
    made, path = model(), tmp_path / "s"
    draws = [*random_state(CPU), torch.arange(16, dtype=torch.uint8)]
    save_state(path, made, optimizers(made), draws, {}, {})
    assert torch.equal(read_tensors(path)[0]["random.cuda"], draws[1])
    assert len(load_state(path, made, optimizers(made), CPU)[1]) == 1


def test_on_cuda_the_devices_own_state_comes_back_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cpu = model(), random_state(CPU)[0]
    saved, present = (torch.full((16,), i, dtype=torch.uint8) for i in (1, 2))
    monkeypatch.setattr("vitft.training.state.random_state", lambda device: [cpu, present])
    for draws, expected in (([cpu, saved], saved), ([cpu], present)):
        save_state(tmp_path / "s", made, optimizers(made), draws, {}, {})
        _, found, _ = load_state(tmp_path / "s", made, optimizers(made), torch.device("cuda"))
        assert len(found) == 2
        assert torch.equal(found[0], cpu)
        assert torch.equal(found[1], expected)
