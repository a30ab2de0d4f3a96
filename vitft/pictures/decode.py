"""An image file in; its pixels through a function, or what its header tells, out."""

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from vitft.pictures.preprocess import is_deep

Fitted = TypeVar("Fitted")
# what Pillow raises of a broken file
UNREADABLE = (
    *(UnidentifiedImageError, Image.DecompressionBombError, OverflowError, MemoryError),
    *(OSError, RuntimeError, SyntaxError, ValueError),
)
PORTABLE = tuple(f"P{i}".encode() for i in range(1, 7))
MAX_HEADER = 2**16  # bytes
SIZES = re.compile(rb"\s*\d+\s+\d+\s")
COMMENT = re.compile(rb"#[^\n\r]*[\n\r]?")
SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"}
SUFFIXES |= {".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# what may be in a file whose name tells no image
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def _opened(path: str | Path | BytesIO) -> Image.Image:
    """Return an image file, opened and not yet decoded, whatever its number of pixels."""
    has_heif()
    _quiet()
    _check_header(path)
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        try:
            return JpegImagePlugin.JpegImageFile(path)  # which may be decoded small
        except SyntaxError:
            pass
        raise


def _check_header(path: str | Path | BytesIO) -> None:
    """Check that the header of a PPM or PGM is short: Pillow reads it byte by byte.

    Raises:
        ValueError: it is not.
    """
    with nullcontext(path) if isinstance(path, BytesIO) else Path(path).open("rb") as file:
        is_portable = file.read(2) in PORTABLE
        header = file.read(MAX_HEADER) if is_portable else b""
        file.seek(0)
    if len(header) == MAX_HEADER and not SIZES.match(COMMENT.sub(b"", header)):
        raise ValueError(f"its header is longer than {MAX_HEADER:,} bytes")


def read_image(
    path: str | Path | BytesIO, fit: Callable[[Image.Image], Fitted], name: str | None = None
) -> Fitted:
    """Return the image file at `path`, or what a file holds, through `fit`.

    Args:
        path: of the file, or its content.
        fit: makes something of it, such as a tensor.
        name: to call it by in an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or a broken one.
    """
    try:
        with _opened(path) as image:
            return fit(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except UNREADABLE as error:
        raise ValueError(
            f"{name or path} is no readable image ({error}); repair or remove it"
        ) from error


def is_image(path: Path) -> bool:
    """Return whether a file's suffix, or where that tells nothing its content, is an image's."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or (suffix in (".heic", ".heif") and has_heif()):
        return True
    try:
        _check_header(path)
        with Image.open(path, formats=FORMATS):
            return True
    except UNREADABLE:
        return False


@cache
def _quiet() -> None:
    """Let Pillow's warnings, of odd EXIF data, say, reach nobody: what is broken is an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def has_heif() -> bool:
    """Return whether pillow-heif is there, and let Pillow read .heic files if so."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def heading(path: Path) -> tuple[tuple[int, int], bool] | None:
    """Return a picture's width and height, and whether it is deep; None where it is broken."""
    try:
        with _opened(path) as image:
            turned = image.getexif().get(274, 1) >= 5  # on its side
            return image.size[::-1] if turned else image.size, is_deep(image)
    except UNREADABLE:
        return None


def extremes(path: Path) -> tuple[float, float] | None:
    """Return the lowest and highest value of a picture; None where it is broken."""
    try:
        with _opened(path) as image:
            values = np.asarray(image, dtype=np.float64)
    except UNREADABLE:
        return None
    return float(values.min()), float(values.max())
