"""A file or folder to write in; the same, locked and cleared of temporary files, out."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from vitft.files import cannot_write, remove_unfinished
from vitft.training.stop import Interrupted, stop_signals

ATTEMPTS = 5  # to acquire a lock whose file another process removes at the same moment
# The errors of a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_writable(folder: Path) -> None:
    """Make the folder, if it is not there, and check that files can be written to it.

    Raises:
        ValueError: its name is no UTF-8, so safetensors could not read what is there.
        OSError: files cannot be written to it.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {folder} is no UTF-8; choose another --out") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # nameless where the system can, so none is left
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextmanager
def locked_path(path: Path, lock: Path) -> Iterator[None]:
    """Lock a file or folder against other processes; the lock ends however the process ends.

    A file system without locks gives none.

    Args:
        path: the file or folder, for error messages.
        lock: the lock's file, which is removed at the end.

    Raises:
        ValueError: another process has the lock, or the lock's folder was removed meanwhile.
        OSError: the lock's file cannot be written.
    """
    file_lock = FileLock(lock)
    inode = _acquire(file_lock, path, lock)
    removed = ValueError(f"{lock.parent} was removed meanwhile; what was written is lost")
    try:
        yield
    except (OSError, ValueError) as error:  # such as a file that is not found
        if inode is not None and not lock.exists():
            raise removed from error
        raise
    else:
        if inode is not None and not lock.exists():
            raise removed
    finally:
        with stop_signals() as received:
            with suppress(OSError):
                lock.unlink(missing_ok=True)
            file_lock.release()
        if received:
            raise Interrupted(received[0])


def _acquire(file_lock: FileLock, path: Path, lock: Path) -> int | None:
    """Acquire a lock, and return its file's inode; None on a file system without locks.

    Raises:
        ValueError: another process has the lock.
        OSError: the lock's file cannot be written.
    """
    busy = ValueError(f"another run writes to {path} now; wait for its end or choose another --out")
    for _ in range(ATTEMPTS):
        before = _inode(lock)
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            if _inode(lock) is None:  # its file could not even be made
                missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                raise cannot_write(path, missing) from None
            raise busy from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise cannot_write(path, error) from error
        if not file_lock.is_locked:
            return None
        if before in (None, inode := _inode(lock)):
            return inode
        file_lock.release()  # its file was removed by the run that had it locked; try the new one
    raise busy


def _inode(path: Path) -> int | None:
    """Return a file's inode, None where there is no file."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextmanager
def output(out: str | Path) -> Iterator[Path]:
    """Lock the file or folder that a command is to write, and yield its path.

    Temporary files that a killed command left of it are removed.

    Raises:
        ValueError: another command writes it now.
        OSError: its folder cannot be written to.
    """
    out = Path(out)
    with suppress(OSError):  # the lock's error says more
        out.parent.mkdir(parents=True, exist_ok=True)
    with locked_path(out, out.with_name(f".{out.name}.lock")):
        remove_unfinished(out.parent, out.name)
        yield out


@contextmanager
def new_output(out: str | Path) -> Iterator[Path]:
    """Lock an output as `output` does, after checking that it does not exist yet.

    Raises:
        ValueError: it exists, or another command writes it now.
        OSError: its folder cannot be written to.
    """
    with output(out) as path:
        if path.exists():
            raise ValueError(f"{out} is there already; choose another --out or remove it")
        yield path
