"""Positions of patches: learned embeddings resized to another image size, and rotary ones."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.model.config import ViTConfig


def resize_positions(grid: Tensor, n_rows: int, *, how: str, offset: float) -> Tensor:
    """Return the position embeddings of a square grid, resized to `n_rows` rows: (1, N, D).

    Args:
        grid: embeddings of M patches, row by row (1, M, D).
        n_rows: rows, and columns, of the result.
        how: interpolation, "bicubic" or "bilinear", with "-antialias" or without.
        offset: unless 0, the scale is (n_rows + offset) / sqrt(M); DINOv2's is 0.1.
    """
    rows = math.isqrt(grid.shape[1])
    x = grid.to(torch.promote_types(grid.dtype, torch.float32))
    x = x.unflatten(1, (rows, rows)).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    kernel, _, antialias = how.partition("-")
    options = {"mode": kernel, "antialias": bool(antialias)}
    if offset:
        factor = float(n_rows + offset) / rows
        x = F.interpolate(x, scale_factor=(factor, factor), **options)  # type: ignore[arg-type]
    else:
        x = F.interpolate(x, size=(n_rows, n_rows), **options)  # type: ignore[arg-type]
    return x.flatten(2).transpose(1, 2).to(grid.dtype)


def positions_of(
    table: Tensor | None, n_pos_prefix: int, config: ViTConfig, image_size: int
) -> Tensor:
    """Return position embeddings (1, prefix + N, D) for images of `image_size`.

    Args:
        table: (1, n_pos_prefix + patches, D) for the config's size; None gives zeros (1, 1, 1).
        n_pos_prefix: tokens before the patches that have a position; the others get zeros.
        config: of the model.
        image_size: side of the images, in pixels.
    """
    if table is None:
        return torch.zeros(1, 1, 1)
    if image_size == config.image_size and n_pos_prefix == config.n_prefix:
        return table
    prefix, grid = table.tensor_split([n_pos_prefix], dim=1)
    if image_size != config.image_size:
        n_rows = image_size // config.patch_size
        grid = resize_positions(grid, n_rows, how=config.pos_resize, offset=config.pos_offset)
    zeros = table.new_zeros(1, config.n_prefix - n_pos_prefix, config.dim)
    return torch.cat([prefix, zeros, grid], dim=1)


class AxialRope(nn.Module):
    """Rotary positions of row and column for the patches' queries and keys (arXiv:2508.10104).

    A head's K features form K / 2 pairs (i, i + K / 2). Each pair is rotated by 2 pi y / period or
    2 pi x / period, at K / 4 periods for each axis, with a patch's coordinates y and x in -1..1.
    Tokens before and after the patches are not rotated.

    Attributes:
        n_rows: rows, and columns, of patches in the images that the model takes now.
    """

    periods: Tensor  # (K / 4,)

    def __init__(self, *, head_dim: int, theta: float, n_prefix: int, n_rows: int) -> None:
        super().__init__()
        self.n_prefix, self.n_rows = n_prefix, n_rows
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) * 4 / head_dim
        self.register_buffer("periods", (theta**exponents).double())

    @classmethod
    def of(cls, config: ViTConfig) -> "AxialRope":
        """Return the rotary positions of a model with this config."""
        return cls(
            head_dim=config.dim // config.n_heads,
            theta=config.rope_theta,
            n_prefix=config.n_prefix,
            n_rows=config.image_size // config.patch_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return queries or keys (B, H, tokens, K), those of the patches rotated."""
        n = self.n_rows**2
        if x.shape[2] <= self.n_prefix:
            return x
        prefix, patches, rest = x.tensor_split([self.n_prefix, self.n_prefix + n], dim=2)
        cos, sin = self._angles(x)
        a, b = patches.chunk(2, dim=-1)
        rotated = patches * cos + torch.cat([-b, a], dim=-1) * sin
        return torch.cat([prefix, rotated, rest], dim=2)

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine (N, K) of every patch's angles, in the dtype of x."""
        wide = torch.promote_types(self.periods.dtype, torch.float32)
        index = torch.arange(self.n_rows, dtype=wide, device=x.device)
        coordinates = 2 * (index + 0.5) / self.n_rows - 1
        angles = 2 * math.pi * coordinates[:, None] / self.periods.to(wide)  # (rows, K / 4)
        n, k = angles.shape
        rows, columns = angles[:, None].expand(n, n, k), angles.expand(n, n, k)
        angles = torch.cat([rows, columns], dim=2).flatten(0, 1).tile(2)  # (N, K)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
