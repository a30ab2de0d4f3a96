"""A computation in parts, each on cores of its own: how a CPU takes a batch.

Where all cores share every operation, they wait for each other some thousand times a step, and send
through memory what would stay in a core's cache. A part a core does neither.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
MIN_IMAGES, MAX_IMAGES = 8, 32  # in a part: fewer make slow products, more leave a core's cache


def n_parts(model: nn.Module, n_images: int) -> int:
    """Return in how many parts to compute a batch of `n_images`; on a GPU it stays whole.

    So it does with dropout, whose random numbers come from one stream.
    """
    if next(model.parameters()).device.type != "cpu":
        return 1
    if any(isinstance(m, nn.Dropout) and m.p and m.training for m in model.modules()):
        return 1
    n_cores = torch.get_num_threads()
    if n_images < MIN_IMAGES * n_cores:
        return max(1, n_images // MIN_IMAGES)
    return n_cores * math.ceil(n_images / (MAX_IMAGES * n_cores))


def each(function: Callable[..., T], parts: Iterable[tuple[Any, ...]], n: int) -> list[T]:
    """Return function(*part) for every part, up to `n` of them side by side.

    Autocast, no_grad and their like are a thread's own, so the function has to enter them itself.
    """
    n_cores = torch.get_num_threads()
    n = min(n, n_cores)
    if n == 1:
        return [function(*part) for part in parts]
    pool = _pool(n, n_cores // n)
    return [future.result() for future in [pool.submit(function, *part) for part in parts]]


@cache
def _pool(n: int, n_cores: int) -> ThreadPoolExecutor:
    """Return `n` threads with `n_cores` each."""
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(n_cores,))
