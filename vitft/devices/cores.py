"""A batch computed in parts on a CPU, each part on separate cores.

Where all cores share every operation, they wait for each other some thousand times a step, and send
through memory what would stay in a core's cache. With one part per core, neither happens.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MIN_IMAGES, MAX_IMAGES = 8, 32  # in a part: fewer make slow products, more leave a core's cache


def n_parts(device: torch.device, n_images: int) -> int:
    """Return in how many parts to compute a batch of `n_images`: more than one on a CPU only."""
    n_cores = torch.get_num_threads()
    if device.type != "cpu":
        return 1
    if n_images < MIN_IMAGES * n_cores:
        return max(1, n_images // MIN_IMAGES)
    return n_cores * math.ceil(n_images / (MAX_IMAGES * n_cores))


def each(function: Callable[..., T], parts: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield function(*part) for every part, in their order, computed side by side on the cores.

    Autocast, no_grad and their like are a thread's own, so the function has to enter them itself.
    """
    waiting, n_cores = deque(parts), torch.get_num_threads()
    n = min(len(waiting), n_cores)
    if n <= 1:
        yield from (function(*part) for part in waiting)
        return
    pool = _pool(n, n_cores // n)
    futures = deque(pool.submit(function, *part) for part in waiting)
    try:
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def in_parts(function: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """Return function(*batch) for tensors (B, ...), computed in parts on a CPU.

    The function may draw no random numbers: their order side by side would be any.
    """
    n = n_parts(batch[0].device, len(batch[0]))
    split = (x.tensor_split(n) for x in batch)
    return torch.cat([*each(function, zip(*split, strict=True))])


@cache
def _pool(n: int, n_cores: int) -> ThreadPoolExecutor:
    """Return `n` threads with `n_cores` each."""
    before, started = torch.get_num_threads(), Barrier(n + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first look takes the process's number; then its own
        torch.set_num_threads(n_cores)
        started.wait()

    pool = ThreadPoolExecutor(n)
    for _ in range(n):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(before)  # it also sets what threads begin with that start later
    return pool
