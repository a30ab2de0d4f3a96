"""How much a command tells whoever waits for it: errors alone by --quiet, more by --verbose."""

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

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors")  # whose versions are told
logger = logging.getLogger("vitft")  # tells at level DEBUG what helps to find a fault


_silenced: ContextVar[TextIO | None] = ContextVar("_silenced", default=None)


def complain(text: str) -> None:
    """Write an error that ends nothing on standard error, also where --quiet is given."""
    from vitft.bars import note  # which imports tqdm

    note(text, _silenced.get() or sys.stderr)


@contextmanager
def telling(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Tell the person who waits nothing but errors, or also what helps to find a fault.

    Raises:
        UsageError: both are asked for.
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
        with _explaining():
            yield
    else:
        yield


@contextmanager
def _explaining() -> Iterator[None]:
    """Write what the logger tells on standard error."""
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
    def emit(self, record: logging.LogRecord) -> None:
        from vitft.bars import note  # which imports tqdm

        note(self.format(record))


def tell_start(name: str, options: Any) -> None:
    """Tell the versions of what computes, and the options of a command."""
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
