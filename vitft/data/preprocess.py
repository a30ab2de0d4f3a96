"""An image file in, uint8 (C, height, width) out: the one way from files to pixels."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

BROKEN = (UnidentifiedImageError, Image.DecompressionBombError, OverflowError, MemoryError)
MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels


def to_tensor(image: Image.Image, *, image_size: int, n_channels: int) -> Tensor:
    """Return an image as uint8 (n_channels, image_size, image_size).

    It is turned upright, scaled to cover the square and cut at the centre.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    image = image.convert(MODES[n_channels])
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, n_channels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or of floats, which Pillow would clip at 255, in 8 bits.

    Raises:
        ValueError: its values are neither those of 8 or 16 bits nor in 0..1.
    """
    sixteen = image.mode.startswith("I;16")
    image = image if image.mode == "F" else image.convert("I")  # I;16B has no extrema
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    deep = sixteen or high > 255
    scale = 1 / 256 if deep else 255 if image.mode == "F" and high <= 1 else 1
    if not 0 <= low <= high < 65536:
        raise ValueError(f"its values, {low:g} to {high:g}, are not those of 8 or 16 bits")
    return image.point(lambda value: value * scale + 0).convert("L")


def read_image(path: str | Path, fit: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return the image file at `path` through `fit`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or a broken one.
    """
    try:
        with Image.open(path) as image:
            return fit(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (*BROKEN, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no readable image ({error}); mend or remove it") from error
