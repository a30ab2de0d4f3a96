"""A text stream in; one that drops output after its reader is gone, and control characters, out."""

import errno
import os
from typing import Any, TextIO

ESCAPED = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in b"\n\t"}
BREAKS = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})

READER_GONE = (errno.EPIPE, errno.EIO)  # of a closed pipe, and of a terminal that is lost


class SafeStream:
    """A text stream that drops what is written once its reader is gone: `| head`, a lost terminal.

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
            inner = text.strip("\r")  # a progress bar returns to the line's start, a name may not
            return self.stream.write(text.replace(inner, inner.translate(ESCAPED), 1))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Redirect the stream's file descriptor to the null device.

        Raises:
            OSError: `error` itself, if it has another reason than that the reader is gone.
        """
        if error.errno not in READER_GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
