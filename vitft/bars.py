"""Progress in images: a bar on a terminal and in a notebook, a line a minute in a log."""

import sys
import time
from typing import Any, TextIO

from tqdm.auto import tqdm

LOG_SECONDS = 60.0  # between two lines of a log
MANY = 10_000  # from so many images on, they are counted in thousands
LINE = "{desc}{n_fmt} of {total_fmt} images  {elapsed} so far, {remaining} left{postfix}"


class LogLines(tqdm):  # type: ignore[misc]
    """Progress for a log: a line every LOG_SECONDS, and no bar."""

    def __init__(self, *, desc: str | None, **options: Any) -> None:
        self.shown = time.monotonic()
        options["desc"] = desc and f"{desc}: "
        super().__init__(bar_format=LINE, mininterval=LOG_SECONDS, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if LOG_SECONDS have passed since the last one."""
        if (now := time.monotonic()) - self.shown >= LOG_SECONDS:
            self.shown = now
            print(str(self), file=sys.stderr, flush=True)

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing, since a line in a log stays."""


def progress_bar(total: int, *, initial: int = 0, desc: str | None = None) -> "tqdm[Any]":
    """Return a bar that counts images on standard error.

    Args:
        total: number of images.
        initial: how many of them are done already.
        desc: what is done, in front of the bar.
    """
    kind = tqdm if sys.stderr.isatty() or "ipykernel" in sys.modules else LogLines
    return kind(
        total=total,
        initial=initial,
        desc=desc,
        unit=" images",
        unit_scale=total >= MANY,
        file=sys.stderr,
    )


def note(text: str, file: TextIO | None = None) -> None:
    """Write a line to a file, by default standard error, above the bar where there is one."""
    tqdm.write(text, file=file or sys.stderr)
