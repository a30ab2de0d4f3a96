"""An opened image file in, uint8 (C, image_size, image_size) out: the one way to pixels.

Validation, evaluation, prediction and every export go this way. The options, `Preprocessing`, are
saved in the file of a base and of an adapter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vitft.records import record_of

MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels
RESIZES = ("shortest", "squash", "pad")
# kernel -> torch's name for it, "" where Pillow resizes
KERNELS = {"bicubic": "", "draft-bicubic": "bicubic", "draft-bilinear": "bilinear"}
KERNELS |= dict.fromkeys(("lanczos", "box", "hamming", "nearest"), "")
HALVES = ("even", "down")
MAX_SIDE = 2**14  # of the images that a model takes, in pixels
MAX_PIXELS = 178_956_970  # of a decoded image: above that Pillow raises an error


@dataclass(frozen=True)
class Framing:
    """How a picture of any shape becomes a square.

    Raises:
        ValueError: a value outside its range.
    """

    # shortest: the shorter side is scaled to the square's, the rest of the longer one is cut off;
    # squash: both sides are; pad: the longer side is, and the rest filled with the mean colour
    resize: str = "shortest"
    crop: float = 1.0  # share of the scaled square's side that is kept, from the middle
    # draft-...: torch resizes, with antialiasing, and a JPEG is decoded at a reduced size, of at
    # least twice the side needed; the others: Pillow resizes, bicubic as in version 0.1
    kernel: str = "bicubic"
    # values of 16-bit and float pictures that become 0 and 255; None: see `eight_bits`
    range: tuple[float, float] | None = None
    # how half a pixel is rounded where an odd number of them is cut off: even, to an even number,
    # as torchvision and timm do; down, as transformers does
    halves: str = "even"

    def __post_init__(self) -> None:
        known = {"resize": RESIZES, "kernel": tuple(KERNELS), "halves": HALVES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(values)}")
        if not 0.01 <= self.crop <= 1:
            raise ValueError(f"crop={self.crop} is not in 0.01 <= crop <= 1")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range={self.range} does not go from a lower to a higher value")


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Framing):
    """All that turns an image file into a model's input, as saved in a base or adapter.

    Raises:
        ValueError: a value outside its range.
    """

    image_size: int
    mean: tuple[float, ...]  # of each channel, for pixels in 0..1
    std: tuple[float, ...]  # likewise
    labels: str = "one"  # an image has one label, or several

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.image_size <= MAX_SIDE:
            raise ValueError(f"image_size={self.image_size} is not in 1..{MAX_SIDE}")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"mean={self.mean} and std={self.std} are not numbers for channels")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std={self.std} is not positive")
        if self.labels not in ("one", "several"):
            raise ValueError(f"labels={self.labels!r} is neither one nor several")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Preprocessing":
        """Return the preprocessing of a file's record; what is missing there is as in version 0.1.

        Raises:
            ValueError: a value is missing, has another type or is outside its range.
        """
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        return record_of(cls, known, "preprocessing")

    @property
    def framing(self) -> Framing:
        """The options of `Framing` alone."""
        return Framing(**{name: getattr(self, name) for name in Framing.__dataclass_fields__})


class _Framed(Protocol):
    image_size: int
    framing: Framing
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """A picture in, uint8 (n_channels, image_size, image_size) out.

    It is turned upright by its EXIF orientation; what is transparent becomes white.

    Raises:
        ValueError: `n_channels` is neither 1 nor 3.
    """

    image_size: int
    n_channels: int = 3
    framing: Framing = Framing()
    fill: tuple[int, ...] = (128,)  # of padding, 0..255, for each channel or one for all

    @classmethod
    def of(cls, model: _Framed) -> "Fit":
        """Return the preprocessing of a model's pictures."""
        fill = tuple(round(255 * min(max(value, 0), 1)) for value in model.mean)
        return cls(model.image_size, len(model.mean), model.framing, fill)

    def __post_init__(self) -> None:
        if self.n_channels not in MODES:
            raise ValueError(
                f"n_channels={self.n_channels} is neither 1 (grey) nor 3 (colour), as image files "
                "have"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the picture as uint8 (n_channels, image_size, image_size).

        Raises:
            ValueError: it is too large to decode, or its values have no known range.
        """
        side = scaled_side(self.image_size, self.framing.crop)
        size = image.size  # which a draft rounds
        image = self.whole(image, side, draft=bool(KERNELS[self.framing.kernel]))
        if image.size == (self.image_size, self.image_size) and self.framing.crop == 1:
            return _to_tensor(image).contiguous()
        if self.framing.kernel == "bicubic":
            return self._cut(_to_tensor(self._fitted_by_pillow(image, side)))
        if (size[0] - size[1]) * (image.width - image.height) < 0:  # it has been turned
            size = (size[1], size[0])
        return self._cut(self._scaled(image, size, side))

    def whole(self, image: Image.Image, side: int, *, draft: bool) -> Image.Image:
        """Return the picture as people see it, upright and on white, of mode L or RGB.

        Args:
            image: opened, and not decoded yet.
            side: to which it will be scaled, in pixels.
            draft: decode a JPEG at a reduced size, of at least twice `side`.

        Raises:
            ValueError: it is too large to decode, or its values have no known range.
        """
        mode = MODES[self.n_channels]
        if draft or image.width * image.height > MAX_PIXELS:
            image.draft(mode, (2 * side, 2 * side))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than can be decoded")
        image = ImageOps.exif_transpose(image)
        if is_deep(image):
            image = eight_bits(image, self.framing.range)
        return _on_white(image).convert(mode)

    def _scaled(self, image: Image.Image, size_in_file: tuple[int, int], side: int) -> Tensor:
        """Return an image (C, height, width) scaled for a square of this side, before it is cut.

        Args:
            image: decoded, perhaps at a reduced size.
            size_in_file: its whole width and height.
            side: of the square.
        """
        lengths, resize = (size_in_file[1], size_in_file[0]), self.framing.resize
        size = [side, side]
        if resize != "squash":
            to_side = (min if resize == "shortest" else max)(lengths)  # the one that becomes `side`
            rounded = int if resize == "shortest" else round  # as torchvision, and timm
            size = [max(1, rounded(side * length / to_side)) for length in lengths]
        kernel = KERNELS[self.framing.kernel]
        if not kernel:
            by_pillow = Image.Resampling[self.framing.kernel.upper()]
            return _to_tensor(image.resize((size[1], size[0]), by_pillow))
        pixels = _to_tensor(image)[None]
        return F.interpolate(pixels, size=size, mode=kernel, antialias=True)[0]

    def _cut(self, image: Tensor) -> Tensor:
        """Return the middle square of an image, of side `image_size`, contiguous.

        Where the image is smaller, it is padded on both sides, with `fill`.
        """
        size = self.image_size
        height, width = (max(0, size - length) for length in image.shape[1:])  # that are missing
        if height or width:
            fill = torch.tensor(self._fill(), dtype=torch.uint8)
            padded = fill[:, None, None].repeat(1, image.shape[1] + height, image.shape[2] + width)
            top, left = height // 2, width // 2
            padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
            image = padded
        rounded = round if self.framing.halves == "even" else math.floor
        top, left = (rounded((length - size) / 2) for length in image.shape[1:])
        return image[:, top : top + size, left : left + size].contiguous()

    def _fitted_by_pillow(self, image: Image.Image, side: int) -> Image.Image:
        """Return an image scaled, and padded or cut, to a square by Pillow's bicubic kernel."""
        kernel = Image.Resampling.BICUBIC
        if self.framing.resize == "squash":
            return image.resize((side, side), kernel)
        if self.framing.resize == "pad":
            fill = self._fill() if self.n_channels > 1 else self._fill()[0]
            return ImageOps.pad(image, (side, side), kernel, color=fill)
        return ImageOps.fit(image, (side, side), kernel)

    def _fill(self) -> tuple[int, ...]:
        """Return `fill` with a value for every channel."""
        return self.fill if len(self.fill) == self.n_channels else self.fill[:1] * self.n_channels


def scaled_side(image_size: int, crop: float) -> int:
    """Return the side of the scaled square of which `crop` is kept, rounded down as timm does."""
    return int(image_size / crop)


def _to_tensor(image: Image.Image) -> Tensor:
    """Return an image of mode L or RGB as uint8 (C, height, width), channels last in memory."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    """Return a picture with white where it is transparent."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Return whether a picture has one channel of 16 or 32 bits, or of floats."""
    return image.mode.startswith(("I", "F"))


def eight_bits(image: Image.Image, span: tuple[float, float] | None) -> Image.Image:
    """Return a deep image, whose values Pillow would clip at 255, scaled to 8 bits.

    Args:
        image: grey, of a mode that begins with I or F.
        span: the values that become 0 and 255. By default 0..65535 where the mode or a value above
            255 says 16 bits, 0..1 for floats up to 1, else 0..255.

    Raises:
        ValueError: without `span`, a value is outside 0..65535; with it, one is not finite.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if span is None:
        deep = image.mode.startswith("I;16") or high > 255
        if not 0 <= low <= high < 65536:
            raise ValueError(f"its values, {low:g} to {high:g}, are not those of 8 or 16 bits")
        scaled = values * (1 / 256 if deep else 255 if image.mode == "F" and high <= 1 else 1)
    else:
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        scaled = (values - span[0]) * (255 / (span[1] - span[0]))
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
