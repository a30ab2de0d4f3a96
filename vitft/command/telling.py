"""How much a command writes to standard error: only errors by --quiet, more by --verbose."""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from dataclasses import fields
from importlib.metadata import version
from typing import Any, TextIO

import click

from vitft.version import __version__

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors")  # of which versions matter
logger = logging.getLogger("vitft")  # at level DEBUG, what helps to find a fault

_silenced: ContextVar[TextIO | None] = ContextVar("_silenced", default=None)  # stderr under --quiet


def complain(text: str) -> None:
    """Write an error after which the command goes on to standard error, even with --quiet."""
    from vitft.bars import note  # which imports tqdm

    note(text, _silenced.get() or sys.stderr)


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Write only errors to standard error (quiet), or also what helps to find a fault (verbose).

    Raises:
        UsageError: both are given.
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose contradict each other; choose one")
    if quiet:
        token = _silenced.set(sys.stderr)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                yield
        finally:
            _silenced.reset(token)
    elif verbose:
        with _debug_messages():
            yield
    else:
        yield


@contextmanager
def _debug_messages() -> Iterator[None]:
    """Write the logger's messages to standard error, then leave the logger as it was."""
    handler = _Notes()
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Notes(logging.Handler):
    """Writes messages above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from vitft.bars import note  # which imports tqdm

        note(self.format(record))


def log_start(name: str, options: Any) -> None:
    """Log the versions of vitft and of what it computes with, and a command's options."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    found = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    python = f"Python {platform.python_version()}"
    logger.debug("vitft %s, %s, %s, %s", __version__, python, found, platform.platform())
    logger.debug("options of vitft %s, with defaults:", name)
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None:
            logger.debug("    %s = %r", field.name, "..." if "token" in field.name else value)
