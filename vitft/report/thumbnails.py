"""Images in; small pictures for a page, PNG or JPEG, out, from the original files if they exist.

A picture that is small already keeps its pixels exactly.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vitft.pictures.decode import read_image
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256  # pixels of a picture's longer side, at most
SMALL = 96  # pixels of the longer side of a picture that becomes a PNG, at most
DARK = 0.15  # brightness of patches without attention


class Thumbnails:
    """Pictures of some images.

    Args:
        images: of a split.
        fit: their preprocessing for the model.
    """

    def __init__(self, images: Images, fit: Fit) -> None:
        self.images, self.fit = images, fit

    def name(self, i: int) -> str:
        """Return the name of image i's file, without its folder; "" where it has no file."""
        if not self.images.are_files:
            return ""
        return Path(self.images.names[i]).name.encode(errors="replace").decode()

    def picture(self, i: int) -> bytes:
        """Return image i: the whole original, or without its file the model's input."""

        def small(image: "Image") -> "Image":
            image = self.fit.whole(image, SIDE, draft=True)
            image.thumbnail((SIDE, SIDE))
            return image

        return encoded(self._read(i, small) or _as_picture(self.images.decode(i)))

    def look(self, i: int, weights: Tensor) -> tuple[bytes, bytes]:
        """Return the square of image i that the model sees, and the same brightened by weights.

        Args:
            i: the image's number.
            weights: attention to its patches (rows, columns), not negative.
        """
        larger = replace(self.fit, image_size=max(SIDE, self.fit.image_size))
        image = self._read(i, lambda image: _as_picture(larger(image)))
        image = _sized(image or _as_picture(self.images.decode(i)))
        return encoded(image), encoded(brightened(image, weights))

    def _read(self, i: int, use: "Callable[[Image], Image]") -> "Image | None":
        """Return what `use` makes of image i's file; None where there is none that can be read."""
        if not self.images.are_files:
            return None
        try:
            return read_image(self.images.names[i], use)
        except (ValueError, OSError):  # the file has been moved or changed since
            return None


def brightened_file(image: Tensor, weights: Tensor) -> bytes:
    """Return `brightened` for an image, uint8 (C, height, width), as the bytes of a file."""
    return encoded(brightened(_sized(_as_picture(image)), weights))


def _sized(image: "Image") -> "Image":
    """Return a picture of at most SIDE; a small one is enlarged, so that brightness is smooth."""
    if image.width < SMALL:
        n = SIDE // image.width
        image = image.resize((n * image.width, n * image.height), 0)
    image.thumbnail((SIDE, SIDE))
    return image


def brightened(image: "Image", weights: Tensor) -> "Image":
    """Return a picture whose brightness follows the weights of its patches (rows, columns).

    The largest 5 % of the weights get full brightness, since single patches of a ViT often have
    many times the weight of all others.
    """
    from PIL import Image

    size = (image.height, image.width)
    light = F.interpolate(weights[None, None].float(), size=size, mode="bicubic")[0, 0]
    low, high = weights.min(), weights.float().quantile(0.95)
    light = DARK + (1 - DARK) * ((light - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    dark = Image.new(image.mode, image.size)
    return Image.composite(image, dark, Image.fromarray((255 * light).byte().numpy()))


def _as_picture(image: Tensor) -> "Image":
    """Return an image, uint8 (C, height, width), grey or colour, as a picture."""
    from PIL import Image

    pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
    return Image.fromarray(pixels.cpu().contiguous().numpy())


def encoded(image: "Image") -> bytes:
    """Return a picture as the bytes of a file: PNG where it is small, else JPEG."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    if small:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=82)
    return file.getvalue()
