"""A transformer block and its parts: tokens (B, N, D) in, tokens (B, N, D) out."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.model.config import ViTConfig
from vitft.model.positions import AxialRope


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), the approximate GELU of OpenAI's CLIP (arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


MAX_PLAIN = 512  # tokens: with more, the N x N scores of plain attention cost too much memory


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v (B, H, n, K) for q (B, H, n, K) and k, v (B, H, N, K).

    On a CPU in bfloat16 it is computed without the fused kernel: in torch 2.13 the backward pass of
    that kernel alone takes longer than the forward and backward pass of the plain formula.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= MAX_PLAIN:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762), four projections: (B, N, D) -> (B, N, D)."""

    rope: AxialRope | None  # shared by all blocks and registered in the model, so not a submodule

    def __init__(
        self, *, dim: int, n_heads: int, qkv_bias: bool = False, proj_bias: bool = False
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.wo = nn.Linear(dim, dim, bias=proj_bias)
        vars(self)["rope"] = None  # past nn.Module.__setattr__, which would register a submodule

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v of every head, concatenated and projected by `wo`.

        With `n`, only the first n tokens are queries: (B, n, D).
        """
        # a strided input would round differently with and without autograd
        queries = x[:, :n].contiguous()
        q = self.wq(queries).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, n, K)
        k = self.wk(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        v = self.wv(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, N, K)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        return self.wo(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, n, D)


class FeedForward(nn.Module):
    """w2(act(w1 x)) on each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float, act: str = "gelu") -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)
        self.dropout, self.act = nn.Dropout(dropout), ACTS[act]

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, N, D)."""
        return self.dropout(self.w2(self.dropout(self.act(self.w1(x)))))


class GatedFeedForward(nn.Module):
    """w2(act(w1 x) * w3 x) on each token (arXiv:2002.05202): (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float, act: str) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)
        self.dropout, self.act = nn.Dropout(dropout), ACTS[act]

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, N, D)."""
        return self.dropout(self.w2(self.dropout(self.act(self.w1(x)) * self.w3(x))))


class LayerScale(nn.Module):
    """A learned factor for each feature of a token (arXiv:2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))  # (D,)

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma * x (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, hidden_dim, dropout = config.dim, config.hidden_dim, config.dropout
        self.norm1 = nn.LayerNorm(dim, config.eps)
        self.attn = Attention(
            dim=dim,
            n_heads=config.n_heads,
            qkv_bias=config.qkv_bias,
            proj_bias=config.proj_bias,
        )
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, config.eps)
        kind, act = (GatedFeedForward, config.gate) if config.gated else (FeedForward, config.act)
        self.ffn: nn.Module = kind(dim=dim, hidden_dim=hidden_dim, dropout=dropout, act=act)
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        """Return x + attention, then that + feed-forward; with `n`, the first n tokens only."""
        x = x[:, :n] + self.ls1(self.attn(self.norm1(x), n))
        return x + self.ls2(self.ffn(self.norm2(x)))
