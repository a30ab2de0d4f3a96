"""A model over several processes: DDP averages its gradients, FSDP2 spreads its weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitft.devices.processes import local_device, n_processes
from vitft.devices.shares import Dropout, Rows


def shard(model: nn.Module, blocks: Iterable[nn.Module], methods: Sequence[str] = ()) -> None:
    """Spread a model's parameters over the processes, in place, block by block (FSDP2).

    Each process then holds its part of them, and has the whole of one block at a time, while it
    computes with it. The model is best on the CPU so far: it moves to the device block by block.

    Args:
        model: on any device; its optimizers are made afterwards.
        blocks: of it.
        methods: that the model is called by, besides `forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = local_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that it is sharded in between
    for name in methods:
        register_fsdp_forward_method(model, name)


def in_step(module: nn.Module) -> nn.Module:
    """Return a module whose backward pass averages gradients over the processes."""
    if n_processes() == 1 or any(map(is_sharded, module.parameters())):
        return module  # FSDP2 does it itself
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients are held once
    )


@contextmanager
def shared_step(module: nn.Module, rows: Rows, *, last: bool) -> Iterator[None]:
    """Take part of a step: dropout as for the whole batch, gradients averaged after the last part.

    Args:
        module: what `in_step` returned.
        rows: the images of this part.
        last: whether no other part of the step follows.
    """
    if rows.here is None:
        yield
        return
    ddp = module if isinstance(module, DistributedDataParallel) and not last else None
    with Dropout(rows), ddp.no_sync() if ddp else nullcontext():
        yield


def is_sharded(value: Tensor) -> bool:
    """Return whether FSDP2 has spread a tensor over the processes."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return a tensor that FSDP2 shards in one piece, on every process."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def sharded_like(place: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor sharded as `place` is, if that is of its shape."""
    if not is_sharded(place) or place.shape != value.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)


@torch.no_grad()
def copy_into(place: Tensor, value: Tensor) -> None:
    """Give a tensor, which may be sharded, the numbers of a whole one."""
    place.copy_(sharded_like(place, value))
