"""The processes that torchrun starts to train one model: how they join and exchange values.

Without torchrun, the only process counts as the first of one, and every exchange returns its own
value.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FAILURES = "vitft/failures"  # counts the processes that failed, in the store that all of them share


def n_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def is_first() -> bool:
    """Return whether this process is the one that writes files and messages."""
    return rank() == 0


def n_on_machine() -> int:
    """Return how many processes share this machine's memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if n_processes() > 1 else 1


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process, as one of several or for a restart."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def attempt() -> int:
    """Return how often torchrun has started the processes again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_time() -> float:
    """Return when this process's parent, torchrun, was started, in seconds since 1970."""
    return psutil.Process(os.getppid()).create_time()


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group of torchrun's processes, and leave it at the end.

    CPU tensors are exchanged by gloo, GPU tensors by NCCL.
    """
    if not started_by_torchrun() or n_processes() > 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, number, n = next(rendezvous("env://"))
    # a dead process leaves its address in the store, so each attempt uses keys of its own
    store = dist.distributed_c10d.PrefixStore(f"vitft/{attempt()}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=n)
    yield
    dist.barrier()  # not after an error, when the others may never reach it
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Return whether this process is the first that failed, and so the one to report its error."""
    if n_processes() == 1:
        return True
    with suppress(RuntimeError):  # the process that keeps the store has ended
        return bool(dist.distributed_c10d._get_default_store().add(FAILURES, 1) == 1)
    return is_first()


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: with several GPUs, the one of its local rank."""
    if device.type != "cuda" or n_processes() == 1:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def from_first(value: T) -> T:
    """Return the first process's value on every process; it must be picklable."""
    if n_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def merged(found: dict[int, T]) -> dict[int, T]:
    """Return the entries of all processes' dictionaries, sorted by key."""
    every: list[Any] = [found]
    if n_processes() > 1:
        every = [None] * n_processes()
        dist.all_gather_object(every, found)
    return dict(sorted(pair for one in every for pair in one.items()))


def barrier() -> None:
    """Wait until every process has called this."""
    if n_processes() > 1:
        dist.barrier()


def add_up(values: Tensor) -> Tensor:
    """Replace a tensor, in place, by its sum over the processes, and return it."""
    if n_processes() > 1:
        dist.all_reduce(values)
    return values


def highest(values: list[int]) -> list[int]:
    """Return the maximum over the processes of each number, without waiting for a GPU."""
    if n_processes() == 1:
        return values
    found = torch.tensor(values)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gathered(values: Tensor) -> Tensor:
    """Return the rows (m, ...) of all processes, in the order of their ranks, on every process."""
    if n_processes() == 1:
        return values
    lengths: list[Any] = [None] * n_processes()
    dist.all_gather_object(lengths, len(values))
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
