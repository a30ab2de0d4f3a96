"""Where a patch lies: a table of position embeddings at another size, and rotary positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
