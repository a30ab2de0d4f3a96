"""Images in; small pictures for a page, PNG or JPEG, out: from the original files where there are.

What is small already stays as it is, to the last bit.
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
SMALL = 96  # up to so many it is a PNG
DARK = 0.15  # brightness of what a model passes over


class Thumbnails:
    """Pictures of some images.

    Args:
        images: those of a split.
        fit: what they go through on their way to the model.
    """

    def __init__(self, images: Images, fit: Fit) -> None:
        self.images, self.fit = images, fit

    def name(self, i: int) -> str:
        """Return what image i is called, without its folder: "" where it has only a number."""
        if not self.images.are_files:
            return ""
        return Path(self.images.names[i]).name.encode(errors="replace").decode()

    def picture(self, i: int) -> bytes:
        """Return image i: all of the original, or what was made of it for the model."""

        def small(image: "Image") -> "Image":
            image = self.fit.whole(image, SIDE, draft=True)
            image.thumbnail((SIDE, SIDE))
            return image

        return encoded(self._read(i, small) or _as_picture(self.images.decode(i)))

    def look(self, i: int, weights: Tensor) -> tuple[bytes, bytes]:
        """Return the square of image i that the model sees, and the same in the light of weights.

        Args:
            i: the image.
            weights: of its patches (rows, columns), not negative.
        """
        larger = replace(self.fit, image_size=max(SIDE, self.fit.image_size))
        image = self._read(i, lambda image: _as_picture(larger(image)))
        image = _sized(image or _as_picture(self.images.decode(i)))
        return encoded(image), encoded(lit(image, weights))

    def _read(self, i: int, use: "Callable[[Image], Image]") -> "Image | None":
        """Return what `use` makes of the file of image i; None without one that can be read."""
        if not self.images.are_files:
            return None
        try:
            return read_image(self.images.names[i], use)
        except (ValueError, OSError):  # it has been moved since
            return None


def in_light(image: Tensor, weights: Tensor) -> bytes:
    """Return an image, uint8 (C, height, width), in the light of its weights, as a file."""
    return encoded(lit(_sized(_as_picture(image)), weights))


def _sized(image: "Image") -> "Image":
    """Return a picture of at most SIDE, a small one larger: so that light falls smoothly."""
    if image.width < SMALL:
        n = SIDE // image.width
        image = image.resize((n * image.width, n * image.height), 0)
    image.thumbnail((SIDE, SIDE))
    return image


def lit(image: "Image", weights: Tensor) -> "Image":
    """Return a picture as bright as the weights (rows, columns), the largest 5 % in full light.

    Of a ViT, single patches often have many times the weight of all others.
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
    """Return a picture as a file: PNG where it is small, else JPEG."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    if small:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=82)
    return file.getvalue()
