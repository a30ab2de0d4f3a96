"""Initialisation of a new base: a model in, its weights set in place."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vitft.model.blocks import Attention
from vitft.model.vit import VisionTransformer


def article(model: VisionTransformer) -> None:
    """Keep the article's: class token and positions N(0, 1), the rest PyTorch's defaults."""


@torch.no_grad()
def small(model: VisionTransformer) -> None:
    """Scale special tokens and positions to N(0, 0.02^2), usual for ViTs.

    The head keeps PyTorch's default. A head of zeros is usual too, but gives the blocks no gradient
    in the first step.
    """
    for parameter in (model.pos_embedding, model.cls_token, model.dist_token, model.registers):
        if parameter is not None:
            parameter.mul_(0.02)


@torch.no_grad()
def sincos(model: VisionTransformer) -> None:
    """Do as `small`, and set the patches' positions to sines and cosines of row and column."""
    small(model)
    grid = sincos_positions(model.config.n_patches, model.config.dim)
    if model.pos_embedding is not None:
        model.pos_embedding[:, -model.config.n_patches :] = grid


@torch.no_grad()
def mimetic(model: VisionTransformer) -> None:
    """Do as `sincos`, and start attention like a trained model's (arXiv:2305.09828, section 3).

    Each head's Wq^T Wk is near 0.7 I, so that a token attends to similar ones; Wo Wv is near
    -0.4 I.
    """
    sincos(model)
    for block in model.blocks:
        attn = block.attn
        assert isinstance(attn, Attention)
        dim = attn.wq.in_features
        n, k = attn.n_heads, dim // attn.n_heads
        noise = torch.randn(n, dim, dim) / math.sqrt(dim)
        u, s, vt = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(dim))  # (H, D, D)
        root = s[:, :k, None].sqrt()
        attn.wq.weight.copy_((root * u.mT[:, :k]).flatten(0, 1))  # (D, D), a head's rows together
        attn.wk.weight.copy_((root * vt[:, :k]).flatten(0, 1))
        noise = torch.randn(dim, dim) / math.sqrt(dim)
        u, s, vt = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(dim))
        attn.wv.weight.copy_(s.sqrt()[:, None] * vt)
        attn.wo.weight.copy_(u * s.sqrt())


INITS: dict[str, Callable[[VisionTransformer], None]] = {
    "article": article,
    "small": small,
    "sincos": sincos,
    "mimetic": mimetic,
}


def initialise(model: VisionTransformer, name: str) -> None:
    """Initialise a new model, in place, by the name of a method in INITS.

    Raises:
        ValueError: unknown name; or a dim not divisible by 4, for "sincos" and "mimetic".
    """
    if name not in INITS:
        raise ValueError(f"unknown init {name!r}; choose from {', '.join(INITS)}")
    INITS[name](model)


def sincos_positions(n_patches: int, dim: int) -> Tensor:
    """Return MoCo v3's position embeddings (N, D) for a square grid (arXiv:2104.02057).

    They are the sines and cosines of a patch's column and row, at D / 4 frequencies each.

    Raises:
        ValueError: `dim` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"{dim=} is not divisible by 4, which positions by sine and cosine need")
    index = torch.arange(math.isqrt(n_patches), dtype=torch.float32)  # of a row or column
    angle = index[:, None] / 10_000 ** (torch.arange(dim // 4) / (dim // 4))  # (rows, D / 4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (rows, D / 2)
    columns, rows = waves.expand(len(index), -1, -1), waves[:, None].expand(-1, len(index), -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
