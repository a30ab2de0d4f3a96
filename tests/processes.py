"""Functions that run in several processes, which know each other."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(n: int, folder: Path, do: Callable[..., None], *arguments: Any) -> None:
    """Call `do(*arguments)` in each of n processes, forked from this one.

    Args:
        n: how many there are.
        folder: where they find each other.
        do: a function of a module.
        arguments: its.
    """
    torch.multiprocessing.start_processes(
        _join, (n, str(folder), do, arguments), nprocs=n, start_method="fork"
    )


def _join(
    rank: int, n: int, folder: str, do: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    multiprocessing.set_start_method(None, force=True)  # for workers that read images
    warnings.resetwarnings()  # DDP has one for shares of one image, which only take longer
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{n}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    do(*arguments)
    dist.barrier()
    dist.destroy_process_group()
