"""The state of a run as one file: weights, optimizers, random state and progress."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitft.devices.processes import is_first
from vitft.devices.spread import copy_into, sharded_like, whole
from vitft.files import read_tensors, write_tensors
from vitft.optimizers.build import trainable_parameters
from vitft.training.draws import random_state

STATE, NEXT = "state.safetensors", "state.next.safetensors"
RANDOM = ("random.cpu", "random.cuda")
CHECKSUM = "checksum"
WEIGHTS = ("best", "average")  # kinds of weights that are saved beside the model's present ones


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    draws: Sequence[Tensor],
    progress: dict[str, Any],
    kept: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write everything that is needed to resume training, whole or not at all.

    Args:
        path: the file.
        model: its trainable parameters and its buffers are saved; the rest comes from the base.
        optimizers: their state is saved, their options are not.
        draws: the random state, as `random_state` gives it.
        progress: the run's progress, as JSON.
        kept: tensors by name, for each of WEIGHTS.
    """
    tensors: dict[str, Tensor] = {
        f"model.{name}": value for name, value in trainable_parameters(model).items()
    }
    tensors |= {f"buffer.{name}": value for name, value in _buffers(model).items()}
    for kind in WEIGHTS:
        tensors |= {f"{kind}.{name}": value for name, value in kept.get(kind, {}).items()}
    for i, optimizer in enumerate(optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": value for name, value in values.items()}
    tensors |= dict(zip(RANDOM, draws, strict=False))
    tensors = {
        name: whole(value) for name, value in tensors.items()
    }  # a collective: by every process, in one order
    if is_first():
        write_tensors(path, tensors, progress | {CHECKSUM: _checksum(tensors, progress)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> tuple[dict[str, Any], list[Tensor], dict[str, dict[str, Tensor]]]:
    """Restore the model and optimizers that `save_state` wrote.

    Returns:
        Progress, random state, and the tensors of each of WEIGHTS by name. Where the run was on
        another kind of device, the random state of this device is its present one.

    Raises:
        FileNotFoundError: nothing was saved.
        ValueError: the file is broken or belongs to another model.
    """
    tensors, progress = read_tensors(path)
    expected = progress.pop(CHECKSUM, None)
    is_old = expected is None and "best" not in progress  # version 0.1 wrote neither of them
    if not is_old and expected != _checksum(tensors, progress):
        raise ValueError(
            f"{path} has been changed since it was saved; start again with --overwrite"
        )
    trained = trainable_parameters(model)
    saved = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    if saved.keys() != trained.keys() or any(saved[k].shape != trained[k].shape for k in saved):
        raise ValueError(f"{path} belongs to another model; choose another --out")
    try:
        _load_optimizers(tensors, optimizers)
        cpu, *own = random_state(device)
        draws = [tensors["random.cpu"], *(tensors.get("random.cuda", state) for state in own)]
        if draws[0].shape != cpu.shape or draws[0].dtype != cpu.dtype:
            raise ValueError("its random state is of another size")
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is broken ({error}); start again with --overwrite") from error
    with torch.no_grad():
        for name, value in saved.items():
            copy_into(trained[name], value)
        for name, buffer in _buffers(model).items():
            copy_into(buffer, tensors.get(f"buffer.{name}", buffer))
    kept: dict[str, dict[str, Tensor]] = {kind: {} for kind in WEIGHTS}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind in kept:
            if name not in trained or trained[name].shape != value.shape:
                raise ValueError(f"{path} is broken (its {kind} weights are another model's)")
            kept[kind][name] = torch.empty_like(trained[name], requires_grad=False)
            copy_into(kept[kind][name], value)
    return progress, draws, kept


def _checksum(tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> int:
    """Return a checksum of a state's tensors and progress."""
    found = zlib.crc32(json.dumps(progress, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(numbers.data, zlib.crc32(f"{name} {value.shape}".encode(), found))
    return found


def _load_optimizers(
    tensors: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                j, key = name.split(".")[2:]
                state.setdefault(int(j), {})[key] = sharded_like(parameters[int(j)], value)
        if len({frozenset(values) for values in state.values()}) > 1:
            raise ValueError("the optimizer state of a parameter is incomplete")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return what the state dict holds beside parameters, such as batch norm's statistics."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {k: v for k, v in model.state_dict().items() if k not in parameters}
