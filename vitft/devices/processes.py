"""Several processes that train one model, as torchrun starts them: who does what.

Every process draws the same random numbers, for a whole batch, and keeps those of its own images.
So an image gets the same ones however many processes there are, and one random state serves them
all. Where there is one process, it has everything.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
FAILURES = "vitft/failures"  # counts the processes that failed, in the store that all of them share


def n_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def is_first() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return rank() == 0


def n_on_machine() -> int:
    """Return how many processes share this machine's memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if n_processes() > 1 else 1


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process, as one of several or for a restart."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def was_restarted() -> bool:
    """Return whether torchrun started this process again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end.

    Tensors of a CPU travel by gloo, those of a GPU by NCCL.
    """
    if not started_by_torchrun() or n_processes() > 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, own_rank, n = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.distributed_c10d.PrefixStore(
            f"vitft/{attempt}", store
        ),  # without what a dead one left there
        rank=own_rank,
        world_size=n,
    )
    yield
    dist.barrier()  # not after an error: the others may never come to it
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Return whether no other process has failed before this one, whose error is then enough."""
    if n_processes() == 1:
        return True
    with suppress(RuntimeError):  # the store went with the process that kept it
        return bool(dist.distributed_c10d._get_default_store().add(FAILURES, 1) == 1)
    return is_first()


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: of several GPUs its own."""
    if device.type != "cuda" or n_processes() == 1:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


@dataclass(frozen=True)
class Rows:
    """The images of a batch that this process has.

    Attributes:
        n: images in the whole batch.
        here: which of them are here (b,); None for all.
        count: whether they count. A process that has none computes one, since the others wait for
            it, and leaves it out.
    """

    n: int
    here: Tensor | None = None
    count: bool = True

    @classmethod
    def of(cls, n: int) -> "Rows":
        """Return the share of this process in a batch of n images.

        Image i and image n - 1 - i, which are mixed with each other, stay together, and reversing
        the rows that are here exchanges them.
        """
        if n_processes() == 1:
            return cls(n)
        pairs = torch.arange((n + 1) // 2).tensor_split(n_processes())[rank()]
        if not len(pairs):
            return cls(n, torch.zeros(1, dtype=torch.long), count=False)
        return cls(n, torch.cat([pairs, n - 1 - pairs]).unique())

    def __len__(self) -> int:
        """Return how many images are here."""
        return self.n if self.here is None else len(self.here)

    @property
    def least(self) -> int:
        """How many images any of the processes has at least."""
        return self.n if self.here is None else max(1, 2 * ((self.n + 1) // 2 // n_processes()) - 1)

    def split(self, n: int) -> list["Rows"]:
        """Return the images that are here in n parts."""
        if self.here is None:
            return [self] * n
        return [Rows(self.n, part, self.count) for part in self.here.tensor_split(n)]

    def chosen(self, batch: Tensor) -> Tensor:
        """Return the rows (b, ...) of a whole batch (n, ...) that are here."""
        return batch if self.here is None else batch[self.here.to(batch.device)]

    def uniform(self, low: float, high: float, *shape: int, device: torch.device) -> Tensor:
        """Return random numbers (*shape, b) between `low` and `high`."""
        drawn = torch.empty(*shape, self.n, device=device).uniform_(low, high)
        return drawn if self.here is None else drawn[..., self.here.to(device)]

    def integers(self, high: int, device: torch.device) -> Tensor:
        """Return random whole numbers (b,) below `high`."""
        return self.chosen(torch.randint(high, (self.n,), device=device))


class Dropout(TorchFunctionMode):
    """Dropout as one process has it: drawn for the whole batch, for the rows that are here.

    It reaches `torch.nn.functional.dropout`, and so `nn.Dropout`, of what has a row for each image.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function, dropout in its own way."""
        kwargs = kwargs or {}
        return (self._dropout if func is F.dropout else func)(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0 or self.rows.here is None or len(input) != len(self.rows):
            return F.dropout(input, p, training, inplace)
        factors = F.dropout(input.new_ones(self.rows.n, *input.shape[1:]), p)
        return input * self.rows.chosen(factors)


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


def from_first(value: T) -> T:
    """Return the first process's value, which pickle can hold."""
    if n_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def merged(found: dict[int, T]) -> dict[int, T]:
    """Return what all processes found, in the order of its numbers."""
    parts: list[Any] = [found]
    if n_processes() > 1:
        parts = [None] * n_processes()
        dist.all_gather_object(parts, found)
    return dict(sorted(pair for part in parts for pair in part.items()))


def barrier() -> None:
    """Wait until every process is here."""
    if n_processes() > 1:
        dist.barrier()


def add_up(values: Tensor) -> Tensor:
    """Add up, in place, what the processes have of a tensor, and return it."""
    if n_processes() > 1:
        dist.all_reduce(values)
    return values


def highest(values: list[int]) -> list[int]:
    """Return the highest over the processes of each of some numbers; no GPU is waited for."""
    if n_processes() == 1:
        return values
    found = torch.tensor(values)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gathered(values: Tensor) -> Tensor:
    """Return the rows of all processes (m, ...), those of the first one first, on each of them."""
    if n_processes() == 1:
        return values
    lengths: list[Any] = [None] * n_processes()
    dist.all_gather_object(lengths, len(values))
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def own_slice(n: int) -> slice:
    """Return which of n things, all alike, this process does."""
    return slice(n * rank() // n_processes(), n * (rank() + 1) // n_processes())


def own_batches(n: int, batch_size: int) -> list[Tensor]:
    """Return the indices of the batches in which this process sees its `own_slice` of n images.

    Every process gets equally many batches, since they may have to wait for each other in each. One
    whose slice is empty gets image 0.
    """
    if not n:
        return []
    own = torch.arange(n)[own_slice(n)]
    most = math.ceil(n / n_processes())
    own = own if len(own) else torch.zeros(1, dtype=torch.long)
    return [*own.tensor_split(math.ceil(most / batch_size))]


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
