"""Memory of a device, in bytes: what is free, what a set of images may take, and the peak."""

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from vitft.devices.processes import highest, n_on_machine

FULL = ("out of memory", "allocate memory", "Storage size calculation overflowed")  # torch's words
SHARE = 4  # a set of images takes at most 1 / SHARE of the free memory
CONTROL_GROUP = Path("/sys/fs/cgroup")  # where Linux tells a container its limits


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_to_container())


def max_set_bytes(device: torch.device) -> int:
    """Return how many bytes a set of images may take on a device; a larger set is streamed.

    So training, validation and test set leave at least 42 % of the memory that was free. The result
    is the same on every process.
    """
    own = free_bytes(device) // SHARE // (n_on_machine() if device.type == "cpu" else 1)
    return -highest([-own])[0]


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that this process has used on a device; None for the CPU on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device's memory is full."""
    full = any(words in str(error) for words in FULL)
    return full or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _left_to_container() -> int:
    """Return the bytes that a container's limit leaves; a very large number without a limit."""
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (
            int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        return max(0, limit - used)
    return 2**62
