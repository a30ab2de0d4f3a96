"""How many images are done: a bar on a terminal and in a notebook, a line a minute in a log."""

import sys
import time
from typing import Any, TextIO

from tqdm.auto import tqdm

LOG_SECONDS = 60.0  # between two lines of a log
MANY = 10_000  # images, which are counted in thousands
LINE = "{desc}{n_fmt} of {total_fmt} images  {elapsed} so far, {remaining} left{postfix}"


class Lines(tqdm):  # type: ignore[misc]
    """A bar for a log: no bar, and a line only when one is due."""

    def __init__(self, *, desc: str | None, **options: Any) -> None:
        self.shown = time.monotonic()
        options["desc"] = desc and f"{desc}: "
        super().__init__(bar_format=LINE, mininterval=LOG_SECONDS, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if one is due."""
        if (now := time.monotonic()) - self.shown >= LOG_SECONDS:
            self.shown = now
            print(str(self), file=sys.stderr, flush=True)

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: a line of a log stays."""


def progress_bar(total: int, *, initial: int = 0, desc: str | None = None) -> "tqdm[Any]":
    """Return a bar that counts images on standard error.

    Args:
        total: how many there are.
        initial: how many of them are done.
        desc: what is done to them.
    """
    kind = tqdm if sys.stderr.isatty() or "ipykernel" in sys.modules else Lines
    return kind(
        total=total,
        initial=initial,
        desc=desc,
        unit=" images",
        unit_scale=total >= MANY,
        file=sys.stderr,
    )


def note(text: str, file: TextIO | None = None) -> None:
    """Write a line on standard error, or to a file, above a bar where there is one."""
    tqdm.write(text, file=file or sys.stderr)
