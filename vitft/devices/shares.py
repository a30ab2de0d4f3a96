"""A batch or a set of images in; this process's share of it, and its random numbers, out.

Every process draws the same random numbers, for a whole batch, and keeps those of its own images.
So an image gets the same ones however many processes there are, and one random state serves them
all. Where there is one process, it has everything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitft.devices.processes import n_processes, rank


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
