"""Where a patch lies: a table of position embeddings at another size, and rotary positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.model.config import ViTConfig


def resize_positions(grid: Tensor, n_rows: int, *, how: str, offset: float) -> Tensor:
    """Return position embeddings (1, M, D) of a square grid for `n_rows` rows: (1, N, D).

    Args:
        grid: row by row.
        n_rows: rows and columns wanted.
        how: "bicubic" or "bilinear", with "-antialias" or without.
        offset: the scale is (n_rows + offset) / rows where this is not 0; DINOv2's is 0.1.
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


def positions_of(table: Tensor | None, n_own: int, config: ViTConfig, image_size: int) -> Tensor:
    """Return position embeddings (1, prefix + N, D) for images of `image_size`.

    Args:
        table: (1, n_own + patches, D) for the config's size; None gives zeros (1, 1, 1).
        n_own: special tokens that have a position; the other ones and the registers get zeros.
        config: of the model.
        image_size: side of the images, in pixels.
    """
    if table is None:
        return torch.zeros(1, 1, 1)
    if image_size == config.image_size and n_own == config.n_prefix:
        return table
    prefix, grid = table.tensor_split([n_own], dim=1)
    if image_size != config.image_size:
        n_rows = image_size // config.patch_size
        grid = resize_positions(grid, n_rows, how=config.pos_resize, offset=config.pos_offset)
    without = table.new_zeros(1, config.n_prefix - n_own, config.dim)
    return torch.cat([prefix, without, grid], dim=1)


class AxialRope(nn.Module):
    """Rotary positions of row and column for the patches' queries and keys (arXiv:2508.10104).

    Coordinates lie in -1..1; a head's K numbers turn by angles 2 pi y / period, 2 pi x / period at
    K / 4 periods, halves against halves. Tokens before and after the patches do not turn.

    Attributes:
        n_rows: rows and columns of the patches now.
    """

    periods: Tensor  # (K / 4,)

    def __init__(self, *, head_dim: int, theta: float, n_prefix: int, n_rows: int) -> None:
        super().__init__()
        self.n_prefix, self.n_rows = n_prefix, n_rows
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) * 4 / head_dim
        self.register_buffer("periods", (theta**exponents).double())

    @classmethod
    def of(cls, config: ViTConfig) -> "AxialRope":
        """Return the rotary positions of a model."""
        return cls(
            head_dim=config.dim // config.n_heads,
            theta=config.rope_theta,
            n_prefix=config.n_prefix,
            n_rows=config.image_size // config.patch_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return queries or keys (B, H, tokens, K) with the patches' turned."""
        n = self.n_rows**2
        if x.shape[2] <= self.n_prefix:
            return x
        prefix, patches, rest = x.tensor_split([self.n_prefix, self.n_prefix + n], dim=2)
        cos, sin = self._angles(x)
        a, b = patches.chunk(2, dim=-1)
        turned = patches * cos + torch.cat([-b, a], dim=-1) * sin
        return torch.cat([prefix, turned, rest], dim=2)

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine (N, K) of every patch's angles, in the dtype of x."""
        wide = torch.promote_types(self.periods.dtype, torch.float32)
        place = torch.arange(self.n_rows, dtype=wide, device=x.device)
        place = 2 * (place + 0.5) / self.n_rows - 1
        turns = 2 * math.pi * place[:, None] / self.periods.to(wide)  # (rows, K / 4)
        n, k = turns.shape
        rows, columns = turns[:, None].expand(n, n, k), turns.expand(n, n, k)
        angles = torch.cat([rows, columns], dim=2).flatten(0, 1).tile(2)  # (N, K)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
