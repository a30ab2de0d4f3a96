"""Labelled images as uint8 (n, C, height, width), held in memory or streamed, and their batches."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitft.devices.memory import max_set_bytes
from vitft.devices.processes import add_up, merged
from vitft.devices.shares import own_slice
from vitft.pictures.stream import Stream


def listed(errors: Sequence[Exception]) -> str:
    """Return up to ten errors in one line."""
    return "; ".join(str(error) for error in errors[:10]) + ("; ..." if len(errors) > 10 else "")


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _n_bytes(name: str) -> int:
    """Return a file's size; -1 where it is gone."""
    try:
        return os.stat(name).st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class _Chosen:
    decode: Callable[[int], Tensor]
    indices: list[int]

    def __call__(self, i: int) -> Tensor:
        return self.decode(self.indices[i])


class Images:
    """Images with labels, held whole or streamed; `decode(i)` gives image i.

    Attributes:
        decode: index -> uint8 (C, height, width).
        labels: class indices (n,); where an image may have several labels, 0 and 1 (n, n_classes).
        sources: what each image was cut from, such as a video; else its number.
        names: each image's file; else its number.
        are_files: whether the names are those of files.
        sized: side in pixels -> a `decode` for squares of at most this side; None where images have
            a fixed size.
        held: every image, uint8 (n, C, height, width), or features, float (n, ...); None where
            images are streamed.
        stage: the stage of a model whose input they are: 0 for pixels, n for the output of its
            first n stages.
    """

    def __init__(
        self,
        decode: Callable[[int], Tensor],
        labels: Tensor,
        sources: Sequence[str] = (),
        names: Sequence[str] = (),
        *,
        sized: Callable[[int], Callable[[int], Tensor]] | None = None,
        are_files: bool = False,
    ) -> None:
        self.decode, self.sized, self.are_files = decode, sized, are_files
        self.labels = labels
        self.sources = list(sources) or [str(i) for i in range(len(labels))]
        self.names = list(names) or [str(i) for i in range(len(labels))]
        self.held: Tensor | None = None
        self.stage = 0
        self._idle: dict[bool, list[Stream]] = {False: [], True: []}

    def __len__(self) -> int:
        return len(self.labels)

    def strata(self) -> Tensor:
        """Return a class for each image (n,): its label, or the rarest of its several labels."""
        labels = self.labels.cpu()
        if labels.ndim == 1:
            return labels
        counts = labels.sum(dim=0)
        return torch.where(labels > 0, counts, len(labels) + 1).argmin(dim=1)

    def digest(self) -> str:
        """Return a hash of labels and sources, which changes where images are added or removed."""
        text = json.dumps([self.labels.tolist(), self.sources])
        return _hashed(text)

    @cached_property
    def contents(self) -> str:
        """A hash of the files' sizes in bytes, which changes where files are replaced."""
        return _hashed(json.dumps([_n_bytes(name) for name in self.names if self.are_files]))

    def subset(self, indices: Tensor) -> "Images":
        """Return the images at `indices` (m,), in that order."""
        chosen, sized = indices.tolist(), self.sized
        subset = Images(
            _Chosen(self.decode, chosen),
            self.labels[indices.cpu()],
            [self.sources[i] for i in chosen],
            [self.names[i] for i in chosen],
            sized=(lambda side: _Chosen(sized(side), chosen)) if sized else None,
            are_files=self.are_files,
        )
        subset.stage = self.stage
        if self.held is not None:
            subset.held = self.held[indices.to(self.held.device)]
        return subset

    def at(self, side: int) -> "Images":
        """Return the images as squares of at most this side, or self where their size is fixed."""
        if self.sized is None:
            return self
        return Images(
            self.sized(side),
            self.labels,
            self.sources,
            self.names,
            sized=self.sized,
            are_files=self.are_files,
        )

    def to(self, device: torch.device, max_bytes: int | None = None) -> "Images":
        """Hold all images on `device` if they fit into `max_bytes`; else they stay streamed.

        `max_bytes` is by default the device's `max_set_bytes`.

        Raises:
            ValueError: images are broken; says how many, and names the first ten. Streamed images
                are not all looked at.
        """
        if broken := [*self._hold(device, max_bytes).values()]:
            raise ValueError(
                f"{len(broken)} of {len(self)} images are broken; repair or remove them, or leave "
                f"them out with --skip-broken: {listed(broken)}"
                if len(broken) > 1
                else f"{listed(broken)}, or leave it out with --skip-broken"
            )
        return self

    def readable(
        self, device: torch.device, max_bytes: int | None = None
    ) -> tuple["Images", list[Exception]]:
        """Return the images that are not broken, held as by `to`, and the errors of the others."""
        failures = self._hold(device, max_bytes, every=True)
        if not failures:
            return self, []
        whole = [i for i in range(len(self)) if i not in failures]
        return self.subset(torch.tensor(whole, dtype=torch.long)), [*failures.values()]

    def _hold(
        self, device: torch.device, max_bytes: int | None, *, every: bool = False
    ) -> dict[int, Exception]:
        """Hold the images if they fit; return the errors of broken ones, by number.

        Args:
            device: to hold them on.
            max_bytes: see `to`.
            every: decode each image, also where they do not fit.
        """
        failures: dict[int, Exception] = {}
        if self.held is None and len(self):
            tried = (self._try(i, failures) for i in range(len(self)))
            first = next((image for image in tried if image is not None), None)
            held, max_bytes = None, max_set_bytes(device) if max_bytes is None else max_bytes
            if first is not None and len(self) * first.numel() <= max_bytes:
                held = first.new_zeros(len(self), *first.shape)  # to stack takes twice the memory

            def decode(i: int) -> None:
                if (image := self._try(i, failures)) is not None and held is not None:
                    held[i] = image

            if held is not None or every:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(decode, range(len(self))[own_slice(len(self))]))
                failures = merged(failures)
            # every process has decoded its slice and has zeros elsewhere
            self.held = None if held is None else add_up(held)
        if self.held is not None:
            self.held, self.labels = self.held.to(device), self.labels.to(device)
        return failures

    def _try(self, i: int, failures: dict[int, Exception]) -> Tensor | None:
        """Return image i, or None where it is broken; its error then goes into `failures`."""
        try:
            return self.decode(i)
        except (ValueError, OSError) as error:
            failures[i] = error
            return None

    def batches(
        self, indices: Sequence[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on `device`: images as held, or uint8 (B, C, height, width), and labels.

        Args:
            indices: of the images of every batch, (B,) each.
            device: of the result.

        Raises:
            ValueError: a streamed image is broken.
        """
        indices = [chosen for chosen in indices if len(chosen)]
        if not indices:
            return
        if self.held is not None:
            for chosen in indices:
                chosen = chosen.to(self.held.device)
                labels = self.labels[chosen.to(self.labels.device)]
                yield self.held[chosen].to(device), labels.to(device)
            return
        pin = device.type == "cuda"
        idle = self._idle[pin]
        stream = idle.pop() if idle else Stream(self.decode, self.labels, pin=pin)
        yield from stream.batches(indices, device)
        idle.append(stream)  # for the next pass; one that breaks off ends its workers
