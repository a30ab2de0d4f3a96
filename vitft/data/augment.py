"""Augmentation of whole batches on their device: images in, images of that shape out.

Images are (B, C, height, width), pixels 0..255 as floats.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch; the default is nothing.

    Raises:
        ValueError: a value outside its range.
    """

    flip: bool = False  # mirror half of the images
    shift: int = 0  # move by up to so many pixels, edges reflected
    # cut out a rectangle of at least this share of the area, sides within 9:10 and 10:9
    min_area: float = 1.0
    trivial: bool = False  # change each image in one way more, see `trivial_augment`
    mixup: float = 0.0  # share of images blended with another (arXiv:1710.09412)
    cutmix: float = 0.0  # share of images that get a rectangle of another (arXiv:1905.04899)

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift={self.shift} is negative; 0 switches it off")
        if not 0 < self.min_area <= 1:
            raise ValueError(
                f"min_area={self.min_area} is not in 0 < min_area <= 1; 1 switches it off"
            )
        if not (min(self.mixup, self.cutmix) >= 0 and self.mixup + self.cutmix <= 1):
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} are shares, and add up to 1 at most"
            )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, height, width) and target probabilities (B, n_classes), changed."""
        if self.flip or self.shift or self.min_area < 1:
            images = self.move(images)
        if self.trivial:
            images = trivial_augment(images)
        if self.mixup or self.cutmix:
            images, targets = self.mix(images, targets)
        return images, targets

    def move(self, images: Tensor) -> Tensor:
        """Return each image cut, shifted and mirrored at random, in one resampling."""
        n, height, width = len(images), *images.shape[-2:]

        def rand(low: float, high: float) -> Tensor:
            return torch.empty(n, device=images.device).uniform_(low, high)

        area = rand(self.min_area, 1)
        widest = (-area.log()).clamp(max=math.log(10 / 9))  # so that no side exceeds the image's
        ratio = (rand(-1, 1) * widest).exp()
        scale_x, scale_y = (area * ratio).sqrt(), (area / ratio).sqrt()
        shift_x = rand(-self.shift - 0.5, self.shift + 0.5).round() * (2 / width)
        shift_y = rand(-self.shift - 0.5, self.shift + 0.5).round() * (2 / height)
        theta = images.new_zeros(n, 2, 3)
        theta[:, 0, 0] = torch.where(rand(0, 1) < 0.5 * self.flip, -scale_x, scale_x)
        theta[:, 1, 1] = scale_y
        theta[:, 0, 2] = shift_x + rand(-1, 1) * (1 - scale_x)
        theta[:, 1, 2] = shift_y + rand(-1, 1) * (1 - scale_y)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return images mixed with the batch in reverse, each by its own share, and the targets."""
        n, height, width = len(images), *images.shape[-2:]
        rand = torch.rand(4, n, 1, 1, 1, device=images.device)
        share = rand[0]  # of the other image
        half_height, half_width = share.sqrt() * height / 2, share.sqrt() * width / 2
        y = torch.arange(height, device=images.device).view(-1, 1) + 0.5 - rand[1] * height
        x = torch.arange(width, device=images.device) + 0.5 - rand[2] * width
        box = (y.abs() < half_height) & (x.abs() < half_width)  # (B, 1, height, width)
        box = box.to(images.dtype)
        even = (rand[3] < self.mixup).to(images.dtype) * share
        inside = ((rand[3] >= self.mixup) & (rand[3] < self.mixup + self.cutmix)) * box
        blend = even + inside  # (B, 1, height, width)
        share = blend.mean(dim=(1, 2, 3)).view(-1, 1)
        mixed = images + blend * (images.flip(0) - images)
        return mixed, targets + share * (targets.flip(0) - targets)


def trivial_augment(images: Tensor) -> Tensor:
    """Return each image changed in one way, drawn with its strength (arXiv:2103.10158, table 1).

    Of the paper's changes only the equalised histogram is left out; its ranges are the narrow ones.
    """
    n, device = len(images), images.device
    change = torch.randint(len(MOVES) + len(RECOLOURINGS) + 1, (n,), device=device)  # 0: none
    strength = torch.empty(n, device=device).uniform_(-1, 1)
    images = _moved(images, change, strength)
    for i, recolour in enumerate(RECOLOURINGS, start=len(MOVES) + 1):
        chosen = (change == i).view(-1, 1, 1, 1)
        changed = recolour(images, strength.view(-1, 1, 1, 1)).clamp(0, 255)
        images = torch.where(chosen, changed, images)
    return images


# the largest: shears, shifts in halves of an image, angle in radians
MOVES = {"shear x": 0.3, "shear y": 0.3, "x": 0.625, "y": 0.625, "turn": math.pi / 6}


def _moved(images: Tensor, change: Tensor, strength: Tensor) -> Tensor:
    """Return the images sheared, shifted or turned where that is their change."""
    shear_x, shear_y, x, y, angle = (
        limit * strength * (change == i) for i, limit in enumerate(MOVES.values(), start=1)
    )
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos, shear_x - sin, x, shear_y + sin, cos, y], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _away(reference: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    """Return the images drawn towards the reference, at -1, or away from it, at 1."""
    return reference + (1 + 0.9 * strength) * (images - reference)


def grey(images: Tensor) -> Tensor:
    """Return the brightness that the eye sees, (B, 1, height, width), by ITU-R BT.601's weights."""
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
    return (images.round() / step).floor() * step  # resampling leaves 127.9998 of 128


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images < 256 * strength.abs(), images, 255 - images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    darkest, brightest = (f(images, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    stretched = 255 * (images - darkest) / (brightest - darkest).clamp(min=1)
    return torch.where(brightest > darkest, stretched, images)  # one colour stays


RECOLOURINGS = (
    *(_brightness, _colour, _contrast, _sharpness),
    *(_posterize, _solarize, _autocontrast),
)
