"""A text stream in; one that drops output after its pipe is closed, and control characters, out."""

import os
from typing import Any, TextIO

ESCAPED = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in b"\n\r\t"}


class SafeStream:
    """A text stream that drops what is written once its reader is gone, as after `| head`.

    So a command, such as a training run, still runs to its end. Control characters are escaped,
    since a name that a file holds could use them to change the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, and return how many characters were written."""
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
        """Redirect the stream's file descriptor to the null device."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
