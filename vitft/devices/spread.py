"""A model on several processes: DDP averages its gradients, FSDP2 shards its parameters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitft.devices.processes import local_device, n_processes
from vitft.devices.shares import Dropout, Rows


def shard(model: nn.Module, blocks: Iterable[nn.Module], methods: Sequence[str] = ()) -> None:
    """Shard a model's parameters over the processes, in place, block by block (FSDP2).

    Each process then holds its share of them, and gathers one block at a time while it computes
    with it. The model should be on the CPU before: it moves to the device block by block.

    Args:
        model: on any device; its optimizers must be made afterwards.
        blocks: its submodules that are sharded and gathered one at a time.
        methods: the model's methods, besides `forward`, that compute with its parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = local_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # by default the root stays gathered
    for name in methods:
        register_fsdp_forward_method(model, name)


def data_parallel(module: nn.Module) -> nn.Module:
    """Return the module so that its backward pass averages gradients over the processes."""
    if n_processes() == 1 or any(map(is_sharded, module.parameters())):
        return module  # FSDP2 averages them itself
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # else gradients are in memory twice
    )


@contextmanager
def shared_step(module: nn.Module, rows: Rows, *, last: bool) -> Iterator[None]:
    """Compute a part of a step: dropout as for the whole batch; the last part averages gradients.

    Args:
        module: what `data_parallel` returned.
        rows: the images of this part.
        last: whether this is the last part of the step.
    """
    if rows.here is None:
        yield
        return
    ddp = module if isinstance(module, DistributedDataParallel) and not last else None
    with Dropout(rows), ddp.no_sync() if ddp else nullcontext():
        yield


def is_sharded(value: Tensor) -> bool:
    """Return whether FSDP2 has sharded a tensor over the processes."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return the whole of a tensor that FSDP2 may have sharded, on every process."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def sharded_like(other: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor sharded as `other` is, if that is sharded and of the same shape."""
    if not is_sharded(other) or other.shape != value.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, which may be sharded."""
    target.copy_(sharded_like(target, value))
