"""The state of a training run as one file: trained tensors, optimizers, random state and place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitft.files import read_tensors, write_tensors

STATE = "state.safetensors"


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the random numbers drawn for `device`: the CPU's, and its own."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Go on drawing from what `random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    place: dict[str, Any],
) -> None:
    """Write everything that training goes on from, whole or not at all.

    Args:
        path: the file.
        model: its trained parameters are saved; frozen ones come from the base.
        optimizers: their state is saved, their options are not.
        place: where in the run this is, as JSON can tell it.
    """
    tensors = {f"model.{name}": value for name, value in _trained(model).items()}
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": value for name, value in values.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, place)


def load_state(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Put back what `save_state` wrote and return the place.

    Raises:
        FileNotFoundError: nothing was saved.
        ValueError: the file is broken or belongs to another model.
    """
    tensors, place = read_tensors(path)
    trained = _trained(model)
    saved = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    if saved.keys() != trained.keys() or any(saved[k].shape != trained[k].shape for k in saved):
        raise ValueError(f"{path} belongs to another model; choose another --out")
    with torch.no_grad():
        for name, value in saved.items():
            trained[name].copy_(value)
    try:
        _load_optimizers(tensors, optimizers)
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is broken ({error}); start again with --overwrite") from error
    return place


def _load_optimizers(
    tensors: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                j, key = name.split(".")[2:]
                state.setdefault(int(j), {})[key] = value
        if len({frozenset(values) for values in state.values()}) > 1:
            raise ValueError("a parameter's state lacks something")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
