"""Standard output and error that survive a closed pipe: later output is dropped."""

import os
from typing import Any, TextIO

ESCAPED = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in b"\n\r\t"}


class Outliving:
    """A text stream that writes to nowhere once its reader is gone, as after `| head`.

    A command then goes on to its end, as a training run must. Control characters, which a name in a
    file may hold, do not reach the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text; return its length."""
        try:
            return self.stream.write(text.translate(ESCAPED))
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Let the stream's file descriptor lead to nowhere from now on."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
