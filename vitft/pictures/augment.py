"""Augmentation of whole batches on their device: images and targets in, changed ones out.

Images are (B, C, height, width), pixels 0..255 as floats.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitft.devices.shares import Rows
from vitft.pictures.changes import erased, rand_augment, trivial_augment


@dataclass(frozen=True)
class Augmentation:
    """The random changes of a training batch; by default none.

    Raises:
        ValueError: a value outside its range.
    """

    flip: bool = False  # mirror half of the images
    shift: int = 0  # largest shift in pixels; edges are reflected
    min_area: float = 1.0  # smallest share of the area that a random crop keeps; 1: no crop
    max_ratio: float = 10 / 9  # largest ratio of a crop's sides, either way
    trivial: bool = False  # TrivialAugment: one more change an image, see `trivial_augment`
    rand: bool = False  # RandAugment: two more changes, see `rand_augment`
    erase: float = 0.0  # share of images in which a rectangle is erased, see `erased`
    mixup: float = 0.0  # share of images blended with another (arXiv:1710.09412)
    cutmix: float = 0.0  # share of images that get a rectangle of another (arXiv:1905.04899)

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift={self.shift} is negative; 0 switches it off")
        if not 0 < self.min_area <= 1:
            raise ValueError(
                f"min_area={self.min_area} is not in 0 < min_area <= 1; 1 switches it off"
            )
        if not self.max_ratio >= 1:
            raise ValueError(f"max_ratio={self.max_ratio} is below 1; 1 keeps the image's shape")
        if self.trivial and self.rand:
            raise ValueError("trivial and rand are two ways to change images; choose one")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase={self.erase} is not in 0 <= erase <= 1; 0 switches it off")
        if not (min(self.mixup, self.cutmix) >= 0 and self.mixup + self.cutmix <= 1):
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} are shares, and add up to 1 at most"
            )

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        size: int | None = None,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return images (B, C, size, size) and target probabilities (B, n_classes), changed.

        Args:
            images: (B, C, height, width); may be larger than `size`, for sharper crops.
            targets: (B, n_classes).
            size: side of the result, where images are flipped, shifted or cropped; by default they
                keep their size.
            rows: which images of the batch these are; by default all.
        """
        rows = rows or Rows(len(images))
        if self.flip or self.shift or self.min_area < 1:
            images = self.move(images, rows, size)
        if self.trivial:
            images = trivial_augment(images, rows)
        if self.rand:
            images = rand_augment(images, rows)
        if self.erase:
            images = erased(images, self.erase, rows)
        if self.mixup or self.cutmix:
            images, targets = self.mix(images, targets, rows)
        return images, targets

    def move(self, images: Tensor, rows: Rows, size: int | None = None) -> Tensor:
        """Return each image cropped, shifted and flipped at random, all in one resampling.

        Arguments and result are those of `__call__`.
        """
        height, width = (size, size) if size else images.shape[-2:]
        n = len(images)

        def rand(low: float, high: float) -> Tensor:
            return rows.uniform(low, high, device=images.device)

        area = rand(self.min_area, 1)
        # a ratio of at most 1 / area keeps both sides of the crop within the image
        widest = (-area.log()).clamp(max=math.log(self.max_ratio))
        ratio = (rand(-1, 1) * widest).exp()
        scale_x, scale_y = (area * ratio).sqrt(), (area / ratio).sqrt()
        shift_x = rand(-self.shift - 0.5, self.shift + 0.5).round() * (2 / width)
        shift_y = rand(-self.shift - 0.5, self.shift + 0.5).round() * (2 / height)
        theta = images.new_zeros(n, 2, 3)
        theta[:, 0, 0] = torch.where(rand(0, 1) < 0.5 * self.flip, -scale_x, scale_x)
        theta[:, 1, 1] = scale_y
        theta[:, 0, 2] = shift_x + rand(-1, 1) * (1 - scale_x)
        theta[:, 1, 2] = shift_y + rand(-1, 1) * (1 - scale_y)
        grid = F.affine_grid(theta, [*images.shape[:2], height, width], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def mix(self, images: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return images and targets mixed with those of the reversed batch, by MixUp or CutMix."""
        height, width = images.shape[-2:]
        rand = rows.uniform(0, 1, 4, device=images.device)[..., None, None, None]
        share = rand[0]  # of the other image
        half_height, half_width = share.sqrt() * height / 2, share.sqrt() * width / 2
        y = torch.arange(height, device=images.device).view(-1, 1) + 0.5 - rand[1] * height
        x = torch.arange(width, device=images.device) + 0.5 - rand[2] * width
        box = (y.abs() < half_height) & (x.abs() < half_width)  # (B, 1, height, width)
        box = box.to(images.dtype)
        mixup = (rand[3] < self.mixup).to(images.dtype) * share
        cutmix = ((rand[3] >= self.mixup) & (rand[3] < self.mixup + self.cutmix)) * box
        blend = mixup + cutmix  # (B, 1, height, width)
        share = blend.mean(dim=(1, 2, 3)).view(-1, 1)
        mixed = images + blend * (images.flip(0) - images)
        return mixed, targets + share * (targets.flip(0) - targets)
