"""A command of vitft in a process of its own, to which something happens; how it ends out.

The process is forked from this one, which has imported all that commands need, so that hundreds of
them take minutes. What happens, happens at one of its file-system events: a file opened to be
written, flushed to the disk, renamed or removed, a folder made or removed.
"""

import errno
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vitft.command.cli import main

SECONDS = 120  # a command that takes longer hangs
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
FREEING = {"os.remove", "os.rmdir"}  # which a full disk allows
FLUSH = "fsync"
Before = Callable[[], None]
Act = Callable[[str, Any], None]  # takes an event's name and its file


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it; None of a hang.
        said: all that it wrote on standard output and standard error.
    """

    status: int | None
    said: str

    @property
    def fault(self) -> str:
        """What is bad about the end: "" of one that was killed, is done or said why it is not."""
        errors = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        if self.status is None:
            return "hang"
        if "Traceback" in self.said or self.status not in (0, 2, 130, -signal.SIGKILL):
            return f"status {self.status}: {self.said.strip()[-200:]}"
        if self.status == 2 and len(errors) != 1:
            return f"{len(errors)} lines of errors: {self.said.strip()[-200:]}"
        return ""


class Command:
    """A command that runs.

    Args:
        arguments: of `vitft`.
        before: called in the new process, before the command.
    """

    def __init__(self, arguments: Sequence[object], before: Before = nothing) -> None:
        reading, writing = os.pipe()
        self.output = open(reading, errors="replace")  # noqa: SIM115
        self.process = get_context("fork").Process(target=_run, args=(writing, arguments, before))
        self.process.start()
        os.close(writing)

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = SECONDS, *, kill: bool = False) -> Ended:
        """Wait for its end; after so many seconds it is killed, which is a hang unless meant."""
        self.process.join(seconds)
        hangs = self.process.is_alive() and not kill
        self.process.kill()
        self.process.join()
        with self.output:
            return Ended(None if hangs else self.process.exitcode, self.output.read())


def _run(writing: int, arguments: Sequence[object], before: Before) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(writing, number)
        setattr(sys, name, os.fdopen(number, "w", 1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["vitft", *map(str, arguments)]
    before()
    main()


class Events:
    """The file-system events of a command; at one of them something happens.

    Args:
        root: events outside of this folder do not count.
        act: what happens.
        at: the number of the event, from 1; never by default.
        on: whether it happens at every later event, too.
    """

    def __init__(self, root: Path, act: Act = print, at: int = sys.maxsize, on: bool = False):
        self.root, self.act, self.at, self.on = f"{root}{os.sep}", act, at, on
        self.count, self.is_acting = mmap.mmap(-1, 8), False

    @property
    def n(self) -> int:
        """How many there were."""
        return int.from_bytes(self.count[:], "little")

    def watch(self) -> None:
        """Watch this process from now on, for good: to be called in a new one."""
        fsync = os.fsync

        def flush(file: int) -> None:
            self._happen(FLUSH, file)
            fsync(file)

        os.fsync = flush
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WATCHED or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and os.fsdecode(arguments[0]).startswith(self.root):
            self._happen(event, arguments[0])

    def _happen(self, event: str, file: Any) -> None:
        if self.is_acting:
            return
        number = self.n + 1
        self.count[:] = number.to_bytes(8, "little")
        if number == self.at or (self.on and number > self.at):
            self.is_acting = True
            try:
                self.act(event, file)
            finally:
                self.is_acting = False


def die(event: str, file: Any) -> None:
    """End at once; what was to be flushed has reached the disk by half."""
    if event == FLUSH:
        os.truncate(file, os.fstat(file).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(event: str, file: Any) -> None:
    """Be asked to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def full(event: str, file: Any) -> None:
    """Find the disk full."""
    if event not in FREEING:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lose(folder: Path) -> Act:
    """Return what loses a folder."""
    return lambda event, file: shutil.rmtree(folder, ignore_errors=True)
