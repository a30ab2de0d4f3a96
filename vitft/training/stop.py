"""What Ctrl-C and SIGTERM do: end an import, and ask training to stop between two steps."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and its state is saved.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one raises KeyboardInterrupt at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with _handled_by(note):
        yield received


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process; some imports swallow a KeyboardInterrupt."""

    def leave(*_: Any) -> None:
        try:
            os.write(2, b"Stopped: interrupted\n")
        finally:  # even if standard error is closed
            os._exit(130)

    with _handled_by(leave):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
