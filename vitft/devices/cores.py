"""A batch computed in parts on a CPU, each part on separate cores.

Where all cores share every operation, they wait for each other thousands of times a step, and
intermediate results travel through memory instead of staying in a core's cache. With one part per
core, neither happens.
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
MIN_IMAGES, MAX_IMAGES = 8, 32  # of a part: fewer multiply slowly, more exceed a core's cache


def n_parts(device: torch.device, n_images: int) -> int:
    """Return in how many parts to compute a batch of `n_images`; 1 on any device but a CPU."""
    n_cores = torch.get_num_threads()
    if device.type != "cpu":
        return 1
    if n_images < MIN_IMAGES * n_cores:
        return max(1, n_images // MIN_IMAGES)
    return n_cores * math.ceil(n_images / (MAX_IMAGES * n_cores))


def each(function: Callable[..., T], parts: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield function(*part) for every part, in order; the parts are computed in parallel threads.

    Threads do not inherit autocast, no_grad and the like, so the function must enter them itself.
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

    The function must not draw random numbers: parallel parts would draw them in any order.
    """
    n = n_parts(batch[0].device, len(batch[0]))
    split = (x.tensor_split(n) for x in batch)
    return torch.cat([*each(function, zip(*split, strict=True))])


@cache
def _pool(n: int, n_cores: int) -> ThreadPoolExecutor:
    """Return a pool of `n` threads, each of which computes on `n_cores` cores."""
    before, started = torch.get_num_threads(), Barrier(n + 1)

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread resets its number
        torch.set_num_threads(n_cores)
        started.wait()

    pool = ThreadPoolExecutor(n)
    for _ in range(n):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(before)  # `start` has changed the default of later threads, too
    return pool
