"""A function that decodes image i in; batches out, which worker processes have decoded."""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitft.devices.processes import n_on_machine


@dataclass(frozen=True)
class _Decoded(Dataset[tuple[Tensor, Tensor]]):
    decode: Callable[[int], Tensor]
    labels: Tensor

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.decode(i), self.labels[i]

    def __len__(self) -> int:
        return len(self.labels)


def _leave_signals(_: int) -> None:
    """Ignore signals in a worker: the main process saves its state, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_STREAMS: "WeakSet[Stream]" = WeakSet()


@atexit.register
def _end_workers() -> None:
    """End all workers before Python does it at its exit, by a signal that they ignore."""
    for stream in [*_STREAMS]:
        stream.end()


class Stream:
    """Batches from workers that stay for the next pass, since starting them may take seconds.

    Args:
        decode: index -> uint8 (C, height, width).
        labels: of every image (n, ...).
        pin: whether batches come in pinned memory, from which copies to CUDA do not wait.
    """

    def __init__(self, decode: Callable[[int], Tensor], labels: Tensor, *, pin: bool) -> None:
        self.order: list[list[int]] = []
        self.pin = pin
        self.loader = DataLoader(
            _Decoded(decode, labels.cpu()),
            batch_sampler=self.order,
            num_workers=max(1, min(8, (os.cpu_count() or 1) // n_on_machine())),
            pin_memory=pin,
            prefetch_factor=4,
            persistent_workers=True,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # not the global one, whose state a run saves and restores
        )
        self.passing: Any = None  # the loader's iterator
        _STREAMS.add(self)

    def end(self) -> None:
        """End the workers."""
        if hasattr(self.passing, "__del__"):
            self.passing.__del__()  # what DataLoader itself ends them by
        self.passing = None

    def batches(
        self, indices: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on `device`: uint8 (B, C, height, width), and labels.

        Only after the whole pass may another one begin.

        Raises:
            ValueError: an image is broken. The workers have ended then.
        """
        self.order[:] = [chosen.tolist() for chosen in indices]
        failure = None
        try:
            self.passing = iter(self.loader)  # the same for every pass, as its workers are
            for images, labels in self.passing:
                yield (
                    images.to(device, non_blocking=self.pin),
                    labels.to(device, non_blocking=self.pin),
                )
        except (ValueError, OSError) as error:  # from a worker, with its traceback as the message
            last = str(error).strip().rpartition("\n")[2]
            failure = last.removeprefix(f"{type(error).__name__}: ")
            error.with_traceback(None)  # a traceback keeps the workers alive
        if failure is not None:
            self.end()
            raise ValueError(failure)
