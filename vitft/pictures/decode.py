"""An image file in; its preprocessed pixels, or its size and values, out."""

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
# what Pillow raises for a broken file
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OverflowError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)
PORTABLE = tuple(f"P{i}".encode() for i in range(1, 7))  # how PBM, PGM and PPM files begin
MAX_HEADER = 2**16  # bytes, of such a file
SIZES = re.compile(rb"\s*\d+\s+\d+\s")
COMMENT = re.compile(rb"#[^\n\r]*[\n\r]?")
SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"}
SUFFIXES |= {".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# formats to try for a file whose suffix is not an image's
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def _opened(path: str | Path | BytesIO) -> Image.Image:
    """Return an image file, opened but not decoded, whatever its number of pixels.

    Raises:
        FileNotFoundError: there is no such file.
        UNREADABLE: one of these errors, where the file is broken.
    """
    has_heif()
    _quiet()
    _check_header(path)
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        try:
            return JpegImagePlugin.JpegImageFile(path)  # which can be decoded at a smaller size
        except SyntaxError:
            pass
        raise


def _check_header(path: str | Path | BytesIO) -> None:
    """Check that the header of a PBM, PGM or PPM is short, since Pillow reads it byte by byte.

    Raises:
        ValueError: the header is longer than MAX_HEADER.
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
    """Return what `fit` makes of an image file.

    Args:
        path: of the file, or its content.
        fit: turns the opened image into something else, such as a tensor.
        name: of the file in an error message; by default its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, or a broken one.
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
    """Return whether a file is an image, by its suffix or else by its content."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or (suffix in (".heic", ".heif") and has_heif()):
        return True
    try:
        _check_header(path)
        with Image.open(path, formats=(*FORMATS, *["HEIF"] * has_heif())):
            return True
    except UNREADABLE:
        return False


@cache
def _quiet() -> None:
    """Silence Pillow's warnings, such as of odd EXIF data: a broken file raises an error anyway."""
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


def read_header(path: Path) -> tuple[tuple[int, int], bool] | None:
    """Return a picture's (width, height) and whether it `is_deep`; None where it is broken."""
    try:
        with _opened(path) as image:
            turned = image.getexif().get(274, 1) >= 5  # orientations 5 to 8 lie on their side
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
