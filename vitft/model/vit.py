"""The base Vision Transformer (arXiv:2010.11929): images in, logits out.

Images are (B, C, height, width), logits (B, n_classes).
Shapes, here and everywhere: `B` batch, `C` channels, `N` tokens, `D` dim, `H` heads, `K` head_dim,
`O` out, `I` in, `R` rank.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.model.config import ViTConfig
from vitft.model.patches import ConvEmbed, PatchEmbed

STEMS = {"linear": PatchEmbed, "conv": ConvEmbed}


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762), four projections: (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v of every head, side by side again, through `wo`.

        With `n`, for the first n tokens only: (B, n, D).
        """
        first = x[:, :n].contiguous()  # else the product rounds otherwise with and without autograd
        q = self.wq(first).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, n, K)
        k = self.wk(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        v = self.wv(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.wo(x.transpose(1, 2).flatten(2))  # (B, n, D)


class FeedForward(nn.Module):
    """Two linears with an exact GELU between them, on each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens transformed, each on its own."""
        return self.dropout(self.w2(self.dropout(F.gelu(self.w1(x)))))


class Block(nn.Module):
    """A pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, hidden_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim=dim, n_heads=n_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden_dim=hidden_dim, dropout=dropout)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        """Return x + attention, then that + feed-forward; with `n`, of the first n tokens only."""
        x = x[:, :n] + self.attn(self.norm1(x), n)
        return x + self.ffn(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches -> tokens -> blocks -> logits.

    Attributes:
        config: the sizes and options it was built from.
        classes: a name for each logit.
        mean, std: per channel, for pixels in 0..1; what `normalize` uses.
        image_size: side of the images that `forward` takes now, in pixels; see `resize`.
    """

    def __init__(self, config: ViTConfig = ViTConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.classes = tuple(str(i) for i in range(config.n_classes))
        self.mean = self.std = (0.5,) * config.n_channels
        n_tokens = config.n_patches + (config.pooling == "cls")
        self.patch_embed = STEMS[config.stem](
            patch_size=config.patch_size, n_channels=config.n_channels, dim=config.dim
        )
        self.cls_token = (
            nn.Parameter(torch.randn(1, 1, config.dim)) if config.pooling == "cls" else None
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, n_tokens, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                dim=config.dim,
                hidden_dim=config.hidden_dim,
                n_heads=config.n_heads,
                dropout=config.dropout,
            )
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.n_classes)

    def new_head(self, classes: Sequence[str]) -> None:
        """Put on a head of zeros for other classes, on the same device and in the same dtype."""
        weight = self.head.weight
        self.head = nn.Linear(
            self.config.dim, len(classes), device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.classes = tuple(classes)

    def resize(self, image_size: int) -> None:
        """Take images of another size from now on.

        The position embedding is interpolated, no parameter changes.

        Raises:
            ValueError: `image_size` is not a positive multiple of the patch size.
        """
        patch_size = self.config.patch_size
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"{image_size=} is not a positive multiple of {patch_size=}; "
                f"try {max(1, round(image_size / patch_size)) * patch_size}"
            )
        self.image_size = image_size

    def positions(self) -> Tensor:
        """Return the position embedding (1, N, D) for images of `image_size`."""
        if self.image_size == self.config.image_size:
            return self.pos_embedding
        n_prefix = self.pos_embedding.shape[1] - self.config.n_patches
        prefix, grid = self.pos_embedding.tensor_split([n_prefix], dim=1)
        rows = math.isqrt(self.config.n_patches)
        grid = grid.unflatten(1, (rows, rows)).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        rows = self.image_size // self.config.patch_size
        wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
        grid = F.interpolate(wide, size=(rows, rows), mode="bicubic", antialias=True)
        return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Return tokens (B, N, D) of normalised images (B, C, height, width), class token first."""
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.dropout(x + self.positions())

    def pool(self, x: Tensor) -> Tensor:
        """Return what the head reads (B, D) of the blocks' output (B, N, D)."""
        x = self.norm(x)
        return x.mean(dim=1) if self.cls_token is None else x[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes) for normalised images (B, C, height, width).

        Raises:
            ValueError: the images have another shape than the model takes.
        """
        expected = (self.config.n_channels, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but the model takes (batch, "
                f"{', '.join(map(str, expected))}); resize the images, "
                "or call model.resize(image_size)"
            )
        return self.run(images)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the steps from images to logits: embed, every block, pool, head.

        Where the head reads the class token, the last block computes no other.
        """
        *blocks, last = self.blocks
        end = last if self.cls_token is None else partial(last, n=1)
        return [self.embed, *blocks, end, self.pool, self.head]

    def run(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Return the output of the stages `first` to `last` - 1 for the input `x` of the first."""
        for stage in self.stages()[first:last]:
            x = stage(x)
        return x

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (B, C, height, width), 0..255, normalised, in the model's dtype."""
        own = self.head.weight.dtype
        wide = torch.promote_types(own, torch.float32)
        mean, std = (  # made on the device, so that nothing is copied to it
            torch.stack([images.new_full((1, 1), 255 * x, dtype=wide) for x in values])
            for values in (self.mean, self.std)
        )
        return ((images - mean) / std).to(own)
