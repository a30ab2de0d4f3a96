"""A model and an image in; each patch's weight in the output, by attention roll-out, out.

Abnar and Zuidema (2020), arXiv:2005.00928: in every block, the mean of the heads' average attention
and the identity, which stands for the residual connection; then the product over the blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.evaluation.evaluate import evaluating, resample
from vitft.model.blocks import Attention
from vitft.model.vit import VisionTransformer

MAX_TOKENS = 2048  # of an image: its attention matrix then takes 17 MB a block


def n_tokens(model: VisionTransformer) -> int:
    """Return how many tokens an image of the model's size has, the prefix included."""
    return model.config.n_prefix + (model.image_size // model.config.patch_size) ** 2


@torch.no_grad()
def rollout(model: VisionTransformer, image: Tensor) -> Tensor:
    """Return the weight (rows, columns) of every patch in what the head reads; the sum is 1.

    The product's rows that count are those of the tokens that the head reads: the class token's
    row, or the mean of the patches' rows. Weight on tokens other than patches (the class token
    itself, registers, prompts) is left out.

    Args:
        model: adapted or not, in any mode; the mode does not change.
        image: pixels, uint8 (C, height, width).

    Raises:
        ValueError: the image has more than MAX_TOKENS tokens.
    """
    n_rows, n = model.image_size // model.config.patch_size, n_tokens(model)
    if n > MAX_TOKENS:
        raise ValueError(f"{n} tokens are more than {MAX_TOKENS}; take smaller images")
    device = model.head.weight.device
    x = resample(model.normalize(image[None].to(device)), model.image_size)
    maps: list[Tensor] = []
    with evaluating(model), _recorded(model, maps):
        model.run(x, last=-1)
    if model.map_pool is None:
        weights = _read_weights(model, n, device)
    else:  # which attends to patches only
        weights = F.pad(maps.pop(), (model.config.n_prefix, 0))
    for attention in reversed(maps):
        mixed = weights @ attention[: weights.shape[1]]
        mixed[:, : weights.shape[1]] += weights
        weights = mixed[:, :n] / 2  # each block has new prompts, which depend on no earlier token
    patches = weights[0, model.config.n_prefix :]
    return (patches / patches.sum()).view(n_rows, n_rows).cpu()


def _read_weights(model: VisionTransformer, n: int, device: torch.device) -> Tensor:
    """Return the weight (1, n) of each token after the last block in what the head reads."""
    pooling, n_prefix = model.config.pooling, model.config.n_prefix
    first, mean = torch.zeros(2, 1, n, device=device)
    first[:, : 2 if pooling == "cls+dist" else 1] = 1
    mean[:, n_prefix:] = 1
    first, mean = first / first.sum(), mean / mean.sum()
    return {"mean": mean, "cls+mean": (first + mean) / 2}.get(pooling, first)


@contextmanager
def _recorded(model: VisionTransformer, maps: list[Tensor]) -> Iterator[None]:
    """Append to `maps` the attention (N, N) of every block, and (1, N) of attention pooling."""

    def note(attn: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(attn, Attention)
        maps.append(_attention(attn, inputs[0], inputs[0]))

    def note_pooling(pool: Any, inputs: tuple[Any, ...]) -> None:
        maps.append(_attention(pool.attn, pool.query, inputs[0]))

    attentions = [block.get_submodule("attn") for block in model.blocks]
    handles = [attn.register_forward_pre_hook(note) for attn in attentions]
    if model.map_pool is not None:
        handles.append(model.map_pool.register_forward_pre_hook(note_pooling))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(attn: Attention, queries: Tensor, x: Tensor) -> Tensor:
    """Return the heads' mean of softmax(q k^T / sqrt(K)), (n, N), for (1, n, D) and (1, N, D)."""
    q = attn.wq(queries).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)  # (1, H, n, K)
    k = attn.wk(x).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2)  # (1, H, N, K)
    if attn.rope is not None:
        q, k = attn.rope(q), attn.rope(k)
    q, k = q[0].float() * q.shape[-1] ** -0.5, k[0].float()
    total = q.new_zeros(q.shape[1], k.shape[1])
    for one_q, one_k in zip(q, k, strict=True):  # one head at a time: less memory
        total += (one_q @ one_k.T).softmax(dim=-1)
    return total / len(q)
