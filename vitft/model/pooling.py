"""All tokens (B, prefix + N, D) in; what the head reads, (B, D or 2 D), out."""

import torch
from torch import Tensor, nn

from vitft.model.blocks import Attention, FeedForward, attend
from vitft.model.config import ViTConfig


def reduce_tokens(x: Tensor, config: ViTConfig) -> Tensor:
    """Return one vector for the tokens (B, prefix + N, D) of an image, by the config's pooling.

    It is (B, D), or (B, 2 D) for "cls+mean" and "cls+dist".
    """
    if config.pooling == "cls":
        return x[:, 0]
    if config.pooling == "cls+dist":
        return x[:, :2].flatten(1)
    mean = x[:, config.n_prefix :].mean(dim=1)
    return mean if config.pooling == "mean" else torch.cat([x[:, 0], mean], dim=1)


class MapPooling(nn.Module):
    """Attention of one learned query to the patches: (B, N, D) -> (B, D) (arXiv:2303.15343)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.attn = Attention(dim=dim, n_heads=config.n_heads, qkv_bias=True, proj_bias=True)
        self.norm = nn.LayerNorm(dim, config.eps)
        self.ffn = FeedForward(dim=dim, hidden_dim=config.hidden_dim, dropout=0.0, act=config.act)

    def forward(self, x: Tensor) -> Tensor:
        """Return the query's output after attention and feed-forward: (B, D)."""
        attn, query = self.attn, self.query.expand(x.shape[0], -1, -1)
        q = attn.wq(query).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)  # (B, H, 1, K)
        k = attn.wk(x).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        v = attn.wv(x).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        y = attend(q, k, v).transpose(1, 2).flatten(2)
        y = attn.wo(y)  # (B, 1, D)
        return (y + self.ffn(self.norm(y)))[:, 0]
