"""Places that a command writes to: held by one process, cleared of what a killed one left there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from vitft.files import cannot_write, remove_unfinished
from vitft.training.stop import Interrupted, stop_signals

ATTEMPTS = 5  # to hold a lock that goes in that moment
# What a file system without locks says.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_writable(folder: Path) -> None:
    """Make the folder, if it is not there, and check that files can be written to it.

    Raises:
        OSError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # without a name, where the file system has such files
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextmanager
def held(place: Path, lock: Path) -> Iterator[None]:
    """Hold a place by a lock, a file which goes however the process ends.

    On a file system without locks it is not held.

    Raises:
        ValueError: another process holds it, or it was removed meanwhile.
        OSError: nothing can be written there.
    """
    held_by = FileLock(lock)
    ours = _acquired(held_by, place, lock)
    try:
        yield
        if ours is not None and not lock.exists():
            raise ValueError(f"{lock.parent} was removed meanwhile; what was written is lost")
    finally:
        with stop_signals() as received:
            with suppress(OSError):
                lock.unlink(missing_ok=True)
            held_by.release()
        if received:
            raise Interrupted(received[0])


def _acquired(held_by: FileLock, place: Path, lock: Path) -> int | None:
    """Acquire a lock, and return the number of its file; None on a file system without locks.

    Raises:
        ValueError: another process holds it.
        OSError: nothing can be written there.
    """
    busy = ValueError(
        f"another run writes to {place} now; wait for its end or choose another --out"
    )
    for _ in range(ATTEMPTS):
        before = _inode(lock)
        try:
            held_by.acquire(timeout=0)
        except Timeout:
            if _inode(lock) is None:  # nor could it be made
                missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                raise cannot_write(place, missing) from None
            raise busy from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise cannot_write(place, error) from error
        if not held_by.is_locked:
            return None
        if before in (None, ours := _inode(lock)):
            return ours
        held_by.release()  # that file went with the run that held it; try the new one
    raise busy


def _inode(path: Path) -> int | None:
    """Return the number of the file that has this name, None where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextmanager
def output(out: str | Path) -> Iterator[Path]:
    """Hold the place of a file or folder that a command writes, and yield it.

    What a killed command has left unfinished of it goes.

    Raises:
        ValueError: another command writes it now.
        OSError: nothing can be written there.
    """
    out = Path(out)
    with suppress(OSError):  # which writing there will tell better
        out.parent.mkdir(parents=True, exist_ok=True)
    with held(out, out.with_name(f".{out.name}.lock")):
        remove_unfinished(out.parent, out.name)
        yield out


@contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """Hold the place of an output, as `output` does, where nothing stands yet.

    Raises:
        ValueError: something stands there, or another command writes it now.
        OSError: nothing can be written there.
    """
    with output(out) as place:
        if place.exists():
            raise ValueError(f"{out} is there already; choose another --out or remove it")
        yield place
