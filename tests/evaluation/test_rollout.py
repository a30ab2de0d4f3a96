"""Attention roll-out is the product of what the blocks attend to, and leaves the model alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapters
from tests.shared import TINY
from vitft.evaluation import rollout as module
from vitft.evaluation.rollout import rollout
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

IMAGE = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def model_of(**options: Any) -> VisionTransformer:
    """Return a tiny model in float64 with large weights, so that it attends unevenly."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**TINY | options, n_classes=3, dropout=0.1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def attention(attn: Any, queries: Tensor, x: Tensor) -> Tensor:
    """Return the mean over the heads of softmax(q k^T / sqrt(K)), (n, N)."""
    rope = attn.rope or (lambda heads: heads)
    q, k = (
        rope(linear(rows).unflatten(-1, (attn.n_heads, -1)).transpose(1, 2))
        for linear, rows in ((attn.wq, queries), (attn.wk, x))
    )
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]


@torch.no_grad()
def expected(model: VisionTransformer, n_prompts: int = 0) -> Tensor:
    """Return the roll-out as the paper has it: every block's whole matrix, one after the other."""
    model = model.eval()
    x = model.embed(model.normalize(IMAGE[None]))
    n, n_prefix = x.shape[1], model.config.n_prefix
    total = torch.eye(n, dtype=x.dtype)
    for block in model.blocks:
        rows = torch.cat([x, block.prompts], 1) if n_prompts else x
        whole = attention(block.attn, block.norm1(rows), block.norm1(rows))
        total = (whole[:n, :n] + torch.eye(n)) / 2 @ total
        x = block(x)
    first, mean = total[0], total[n_prefix:].mean(0)
    if model.map_pool is not None:
        assert model.config.final_norm == "before"
        x = model.norm(x)
        first = (attention(model.map_pool.attn, model.map_pool.query, x) @ total)[0]
    read = {"mean": mean, "cls+mean": (first + mean) / 2, "cls+dist": total[:2].mean(0)}
    patches = read.get(model.config.pooling, first)[n_prefix:]
    return (patches / patches.sum()).view(2, 2)


@pytest.mark.parametrize(
    "options",
    [
        *({"pooling": pooling} for pooling in ("cls", "mean", "cls+mean", "cls+dist", "map")),
        {"n_registers": 2, "pooling": "cls"},
        {"rope_theta": 100.0, "pos": "none", "pooling": "mean"},
    ],
    ids=str,
)
def test_a_roll_out_is_the_paper_s(options: dict[str, Any]) -> None:
    model = model_of(**options)
    found = rollout(model, IMAGE)
    assert found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found.double(), expected(model), rtol=1e-4, atol=1e-6)
    assert found.max() > 1.05 * found.min()


def test_prompts_and_adapters_take_part() -> None:
    plain = rollout(model_of(), IMAGE)
    for config in (adapters.VPTConfig(n_prompts=3), adapters.LoRAConfig(rank=2, targets=("wq",))):
        model = adapters.inject(model_of(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.5)
        found = rollout(model, IMAGE)
        assert not torch.allclose(found, plain, rtol=1e-3)
        n_prompts = 3 if isinstance(config, adapters.VPTConfig) else 0
        torch.testing.assert_close(found.double(), expected(model, n_prompts), rtol=1e-4, atol=1e-6)


def test_a_roll_out_leaves_the_model_as_it_is() -> None:
    model = model_of().train()
    model.blocks[0].eval()
    rollout(model, IMAGE)
    assert [block.training for block in model.blocks] == [False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_too_many_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 3)
    with pytest.raises(ValueError, match="are more than 3; take smaller images"):
        rollout(model_of(), IMAGE)
