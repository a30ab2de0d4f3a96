"""A batch or a set of images in; this process's share of it, and its random numbers, out.

Every process draws the random numbers of the whole batch and keeps those of its own images. So an
image gets the same numbers however many processes there are, and all processes have the same random
state. A single process has every image.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from vitft.devices.processes import n_processes, rank


@dataclass(frozen=True)
class Rows:
    """Which images of a batch this process computes.

    Attributes:
        n: images in the whole batch.
        here: indices (b,) of this process's images in the batch; None for all.
        count: whether they count. A process without an image computes one nevertheless, since the
            others wait for it in collective operations, but must leave it out of sums.
    """

    n: int
    here: Tensor | None = None
    count: bool = True

    @classmethod
    def of(cls, n: int) -> "Rows":
        """Return the share of this process in a batch of n images.

        Images i and n - 1 - i, which MixUp and CutMix blend with each other, are on one process,
        and reversing its rows exchanges them.
        """
        if n_processes() == 1:
            return cls(n)
        pairs = torch.arange((n + 1) // 2).tensor_split(n_processes())[rank()]
        if not len(pairs):
            return cls(n, torch.zeros(1, dtype=torch.long), count=False)
        return cls(n, torch.cat([pairs, n - 1 - pairs]).unique())

    def __len__(self) -> int:
        """Return how many images this process has."""
        return self.n if self.here is None else len(self.here)

    @property
    def least(self) -> int:
        """The least number of images that a process has, one that does not count included."""
        return self.n if self.here is None else max(1, 2 * ((self.n + 1) // 2 // n_processes()) - 1)

    def split(self, n: int, *, named: bool) -> list["Rows"]:
        """Return the rows of n parts of this process's images.

        Args:
            n: number of parts.
            named: name the images also where this process has all; otherwise each part is then the
                same as the whole.
        """
        if self.here is None and not named:
            return [self] * n
        here = torch.arange(self.n) if self.here is None else self.here
        return [Rows(self.n, part, self.count) for part in here.tensor_split(n)]

    def chosen(self, batch: Tensor) -> Tensor:
        """Return this process's rows (b, ...) of a whole batch (n, ...)."""
        return batch if self.here is None else batch[self.here.to(batch.device)]

    def uniform(self, low: float, high: float, *shape: int, device: torch.device) -> Tensor:
        """Return random numbers (*shape, b) in low..high for this process's images."""
        drawn = torch.empty(*shape, self.n, device=device).uniform_(low, high)
        return drawn if self.here is None else drawn[..., self.here.to(device)]

    def integers(self, high: int, device: torch.device) -> Tensor:
        """Return random integers (b,) in 0..high - 1 for this process's images."""
        return self.chosen(torch.randint(high, (self.n,), device=device))


class Dropout(TorchFunctionMode):
    """A mode in which dropout draws for the whole batch and takes the rows of this process.

    So the result is that of one process. It changes `torch.nn.functional.dropout`, and with it
    `nn.Dropout`, for inputs that have a row for each image.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function; dropout is replaced."""
        kwargs = kwargs or {}
        return (self._dropout if func is F.dropout else func)(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        if not training or p == 0 or self.rows.here is None or len(input) != len(self.rows):
            return F.dropout(input, p, training, inplace)
        factors = F.dropout(input.new_ones(self.rows.n, *input.shape[1:]), p)
        return input * self.rows.chosen(factors)


def first_and_again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of a pass and of its repetition in the backward pass, for `checkpoint`.

    In both, dropout is that of the present mode: `Tensor.backward` computes without it.
    """
    mode = _get_current_function_mode()
    return nullcontext(), mode if isinstance(mode, Dropout) else nullcontext()


def own_slice(n: int) -> slice:
    """Return which of n equal pieces of work this process does."""
    return slice(n * rank() // n_processes(), n * (rank() + 1) // n_processes())


def own_batches(n: int, batch_size: int) -> list[Tensor]:
    """Return the batches, as indices (b,), of this process's `own_slice` of n images.

    Every process gets the same number of batches, since processes may wait for each other in each.
    One whose slice is empty gets image 0.
    """
    if not n:
        return []
    own = torch.arange(n)[own_slice(n)]
    most = math.ceil(n / n_processes())
    own = own if len(own) else torch.zeros(1, dtype=torch.long)
    return [*own.tensor_split(math.ceil(most / batch_size))]
