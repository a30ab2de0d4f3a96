"""Initial values of LoRA: the weight W (O, I) of a linear in, A (R, I) and B (O, R) out.

Each function takes W, the rank R and the update's scale. A and B are in float32 or wider,
contiguous, and own their memory.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.layers import wide


def kaiming(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A uniform within 1 / sqrt(I) and B zero, as in LoRA's own code (arXiv:2106.09685)."""
    a = wide(weight.new_empty(rank, weight.shape[1]))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, a.new_zeros(len(weight), rank)


def gaussian(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A drawn from N(0, 1 / R^2) and B zero, as PEFT does."""
    a = wide(weight.new_empty(rank, weight.shape[1]))
    nn.init.normal_(a, std=1 / rank)
    return a, a.new_zeros(len(weight), rank)


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A, B with scale B A the rank-R matrix closest to W (PiSSA, arXiv:2404.02948)."""
    u, s, v = torch.linalg.svd(wide(weight), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the QR decomposition of W, its first rows and columns (OLoRA, arXiv:2406.01775)."""
    q, r = torch.linalg.qr(wide(weight))
    dense = torch.contiguous_format
    return r[:rank].clone(memory_format=dense), q[:, :rank].clone(memory_format=dense)


INITS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
}
