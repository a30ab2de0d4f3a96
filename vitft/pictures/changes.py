"""Changes of pixels, drawn for each image of a batch on its device: images in, images out.

Images are (B, C, height, width), pixels 0..255 as floats.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitft.devices.shares import Rows

TRIES = 10  # rectangles drawn for an image, of which the first that fits is erased


def trivial_augment(images: Tensor, rows: Rows) -> Tensor:
    """Return each image changed in one way, drawn with its strength (arXiv:2103.10158, table 1).

    The changes are the paper's, except equalize, with its narrow ranges of strength.

    Args:
        images: (B, C, height, width).
        rows: which images of the batch these are.
    """
    return changed(images, rows.uniform(-1, 1, device=images.device), rows)


def rand_augment(
    images: Tensor, rows: Rows, n_changes: int = 2, magnitude: float = 9 / 30
) -> Tensor:
    """Return each image changed `n_changes` times, in ways that are drawn (arXiv:1909.13719).

    The changes are those of `trivial_augment`.

    Args:
        images: (B, C, height, width).
        rows: which images of the batch these are.
        n_changes: changes of an image, one after the other.
        magnitude: strength of a change, as a share of the largest; its sign is drawn.
    """
    for _ in range(n_changes):
        sign = rows.integers(2, images.device) * 2.0 - 1
        images = changed(images, magnitude * sign, rows)
    return images


def changed(images: Tensor, strength: Tensor, rows: Rows) -> Tensor:
    """Return each image after one change, which is drawn, of the given strength (B,) in -1..1."""
    change = rows.integers(len(MOVES) + len(RECOLOURINGS) + 1, images.device)  # 0: none
    images = _moved(images, change, strength)
    for i, recolour in enumerate(RECOLOURINGS, start=len(MOVES) + 1):
        chosen = (change == i).view(-1, 1, 1, 1)
        recoloured = recolour(images, strength.view(-1, 1, 1, 1)).clamp(0, 255)
        images = torch.where(chosen, recoloured, images)
    return images


# largest shears, shifts in halves of an image's side, and rotation in radians
MOVES = {"shear x": 0.3, "shear y": 0.3, "x": 0.625, "y": 0.625, "turn": math.pi / 6}


def _moved(images: Tensor, change: Tensor, strength: Tensor) -> Tensor:
    """Return the images, sheared, shifted or rotated where `change` (B,) says so."""
    shear_x, shear_y, x, y, angle = (
        limit * strength * (change == i) for i, limit in enumerate(MOVES.values(), start=1)
    )
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos, shear_x - sin, x, shear_y + sin, cos, y], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _away(reference: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    """Return the images blended with a reference, at strength -1, or moved away from it, at 1."""
    return reference + (1 + 0.9 * strength) * (images - reference)


def grey(images: Tensor) -> Tensor:
    """Return the luma (B, 1, height, width) of images (B, C, height, width) by ITU-R BT.601."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _away(torch.zeros_like(images), images, strength)


def _colour(images: Tensor, strength: Tensor) -> Tensor:
    return _away(grey(images), images, strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _away(grey(images).mean(dim=(2, 3), keepdim=True), images, strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    around = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return _away((9 * around + 4 * images) / 13, images, strength)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2 ** (4 * strength.abs()).round()  # 8 to 4 bits are left
    return (images.round() / step).floor() * step  # rounded, as resampling makes 127.9998 of 128


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images < 256 * strength.abs(), images, 255 - images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    darkest, brightest = (f(images, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    stretched = 255 * (images - darkest) / (brightest - darkest).clamp(min=1)
    return torch.where(brightest > darkest, stretched, images)  # a constant channel stays


RECOLOURINGS = (
    _brightness,
    _colour,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
)


def erased(images: Tensor, share: float, rows: Rows) -> Tensor:
    """Return images, a share of them with a rectangle of their mean colour (arXiv:1708.04896).

    As in torchvision's RandomErasing, the rectangle has 2 to 33 % of the area, and sides in a ratio
    of 3:10 to 10:3.

    Args:
        images: (B, C, height, width).
        share: probability that an image is changed.
        rows: which images of the batch these are.
    """
    (height, width), device = images.shape[-2:], images.device
    area = rows.uniform(0.02, 0.33, TRIES, device=device) * height * width
    ratio = rows.uniform(math.log(0.3), math.log(3.3), TRIES, device=device).exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(dim=0, keepdim=True)
    tall, wide = (side.gather(0, first)[0] for side in (tall, wide))
    chosen = (rows.uniform(0, 1, device=device) < share) & fits.any(dim=0)
    top = (rows.uniform(0, 1, device=device) * (height - tall + 1)).floor()
    left = (rows.uniform(0, 1, device=device) * (width - wide + 1)).floor()
    y = torch.arange(height, device=device)[:, None] - top.view(-1, 1, 1, 1)
    x = torch.arange(width, device=device) - left.view(-1, 1, 1, 1)
    inside = (y >= 0) & (y < tall.view(-1, 1, 1, 1)) & (x >= 0) & (x < wide.view(-1, 1, 1, 1))
    mean = images.mean(dim=(2, 3), keepdim=True)
    return torch.where(inside & chosen.view(-1, 1, 1, 1), mean, images)
