"""Every option of the model beside one reference in plain PyTorch, image by image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.shared import TINY
from vitft.model.blocks import Attention, FeedForward
from vitft.model.config import ViTConfig
from vitft.model.patches import PatchEmbed
from vitft.model.pooling import reduce_tokens
from vitft.model.vit import VisionTransformer

State = dict[str, Tensor]
ACTS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}  # fmt: skip


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0.0)


def norm(s: State, name: str, x: Tensor, config: ViTConfig) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def turned(x: Tensor, config: ViTConfig) -> Tensor:
    """Return queries or keys (tokens, K) of a head with the patches' turned, as complex numbers."""
    k, n = x.shape[1], config.image_size // config.patch_size
    out = torch.complex(x[:, : k // 2], x[:, k // 2 :])
    for i in range(n * n):
        y, across = (2 * (place + 0.5) / n - 1 for place in divmod(i, n))
        for j in range(k // 4):
            period = config.rope_theta ** (4 * j / k)
            for column, place in ((j, y), (j + k // 4, across)):
                angle = 2 * math.pi * place / period
                out[config.n_prefix + i, column] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([out.real, out.imag], dim=1)


def attention(s: State, name: str, of: Tensor, to: Tensor, config: ViTConfig) -> Tensor:
    q, keys, v = (linear(s, f"{name}.{w}", x) for w, x in (("wq", of), ("wk", to), ("wv", to)))
    k, heads = config.dim // config.n_heads, []
    for h in range(config.n_heads):
        a, b, c = (x[:, h * k : (h + 1) * k] for x in (q, keys, v))
        if config.rope_theta and name.startswith("blocks"):
            a, b = turned(a, config), turned(b, config)
        heads.append((a @ b.T / math.sqrt(k)).softmax(dim=1) @ c)
    return linear(s, f"{name}.wo", torch.cat(heads, dim=1))


def feed_forward(s: State, name: str, x: Tensor, config: ViTConfig) -> Tensor:
    if f"{name}.w3.weight" in s:
        return linear(
            s, f"{name}.w2", ACTS["silu"](linear(s, f"{name}.w1", x)) * linear(s, f"{name}.w3", x)
        )
    return linear(s, f"{name}.w2", ACTS[config.act](linear(s, f"{name}.w1", x)))


def embedded(model: VisionTransformer, image: Tensor) -> Tensor:
    s, config, p = model.state_dict(), model.config, model.config.patch_size
    if config.stem == "conv":
        x = F.conv2d(image[None], s["patch_embed.conv1.weight"], padding=1)
        x = F.group_norm(x, 4, *(s[f"patch_embed.conv_norm1.{n}"] for n in ("weight", "bias")))
        x = F.conv2d(ACTS["gelu"](x), s["patch_embed.conv2.weight"], padding=1, stride=2)
        x = F.group_norm(x, 8, *(s[f"patch_embed.conv_norm2.{n}"] for n in ("weight", "bias")))
        kernel = (s[f"patch_embed.conv3.{n}"] for n in ("weight", "bias"))
        x = F.conv2d(ACTS["gelu"](x), *kernel, stride=p // 2)[0].flatten(1).T
    else:
        patches = image.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4).flatten(2)
        x = linear(s, "patch_embed", patches.flatten(0, 1))
    special = [s[n][0] for n in ("cls_token", "dist_token") if n in s]
    registers = [s["registers"][0]] if "registers" in s else []
    if "pos_embedding" not in s:
        return torch.cat([*special, *registers, x])
    n = len(special) if config.n_pos_prefix is None else config.n_pos_prefix
    table = s["pos_embedding"][0]
    assert len(table) == n + config.n_patches
    before = torch.cat([*special, x.new_zeros(0, config.dim)])
    before = torch.cat([before[:n] + table[:n], before[n:]])
    return torch.cat([before, *registers, x + table[n:]])


def reference(model: VisionTransformer, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features and logits of one image."""
    s, config = model.state_dict(), model.config
    x = embedded(model, image)
    x = norm(s, "pre_norm", x, config) if config.pre_norm else x
    for i in range(config.n_layers):
        y = norm(s, f"blocks.{i}.norm1", x, config)
        x = x + attention(s, f"blocks.{i}.attn", y, y, config) * s.get(f"blocks.{i}.ls1.gamma", 1.0)
        y = feed_forward(s, f"blocks.{i}.ffn", norm(s, f"blocks.{i}.norm2", x, config), config)
        x = x + y * s.get(f"blocks.{i}.ls2.gamma", 1.0)
    x = norm(s, "norm", x, config) if config.final_norm == "before" else x
    patches = x[config.n_prefix :].mean(dim=0)
    if config.pooling == "map":
        patches = x[config.n_prefix :]
        y = attention(s, "map_pool.attn", s["map_pool.query"][0], patches, config)
        y = (y + feed_forward(s, "map_pool.ffn", norm(s, "map_pool.norm", y, config), config))[0]
    else:
        both = {"cls": [x[0]], "cls+dist": [x[0], x[1]], "mean": [patches]}
        y = torch.cat(both.get(config.pooling, [x[0], patches]))
    y = norm(s, "norm", y, config) if config.final_norm == "after" else y
    return y, linear(s, "head", y)


OPTIONS: list[dict[str, Any]] = [
    *({"pooling": pooling} for pooling in ("mean", "cls+mean", "cls+dist", "map")),
    *({"act": act} for act in ("gelu", "gelu_tanh", "quick_gelu")),
    {"qkv_bias": True, "eps": 0.1},
    {"proj_bias": True, "layer_scale": True},
    {"patch_bias": False, "head_bias": False, "gated": True},
    {"pooling": "mean", "class_token": True, "dist_token": True},
    {"n_registers": 3, "n_pos_prefix": 0},
    {"n_registers": 2, "pooling": "cls+mean", "dist_token": True, "n_pos_prefix": 1},
    {"pos": "none", "rope_theta": 100.0, "n_heads": 2, "n_registers": 1},
    {"rope_theta": 7.0, "pooling": "mean", "n_heads": 4},
    {"pre_norm": True, "final_norm": "none", "eps": 0.2},
    {"final_norm": "after", "pooling": "mean", "eps": 0.3},
    {"pooling": "map", "act": "quick_gelu", "eps": 0.1, "n_heads": 4},
    {"stem": "conv", "n_channels": 1},
    {"stem": "conv", "patch_size": 2},
    {"dim": 24, "n_heads": 3, "n_layers": 3, "patch_size": 2, "n_channels": 1, "n_classes": 5},
]


def made(options: dict[str, Any]) -> VisionTransformer:
    """Return a model in float64 whose every parameter is random and not zero."""
    model = VisionTransformer(ViTConfig(**TINY | {"dropout": 0.0, "n_classes": 3} | options))
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, 0.1, 0.4)
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_of_any_options_is_the_reference(options: dict[str, Any]) -> None:
    model = made(options)
    images = torch.randn(2, model.config.n_channels, 8, 8, dtype=torch.float64)
    features, logits = zip(*(reference(model, image) for image in images), strict=True)
    torch.testing.assert_close(model(images), torch.stack(logits), rtol=0, atol=1e-10)
    torch.testing.assert_close(model.features(images), torch.stack(features), rtol=0, atol=1e-10)
    assert features[0].shape == (model.config.n_features,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_all_of_them_and_give_the_features(options: dict[str, Any]) -> None:
    model = made(options)
    config = model.config
    images = torch.randn(2, config.n_channels, 8, 8, dtype=torch.float64)
    tokens = model.tokens(images)
    assert tokens.shape == (2, config.n_prefix + config.n_patches, config.dim)
    if config.final_norm == "before" and config.pooling == "mean":
        mean = tokens[:, config.n_prefix :].mean(dim=1)
        torch.testing.assert_close(model.features(images), mean)
    if config.final_norm == "before" and config.pooling == "cls":
        torch.testing.assert_close(model.features(images), tokens[:, 0])


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_is_at_work_where_the_article_has_it(gated: bool) -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.5, gated=gated, pooling="map"))
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.modules()) == 3
    ffn = model.blocks[0].ffn.train()
    x = torch.randn(50, 4, 16)
    dropped = (ffn(x) == 0).double().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.05)
    nn.init.constant_(ffn.w2.weight, 1.0)
    nn.init.constant_(ffn.w2.bias, 0.0)
    assert len(ffn(x)[ffn(x) != 0].unique()) > 100  # what is inside drops out as well


def test_learned_starts_are_of_unit_size_and_new_factors_of_one() -> None:
    options = {"dim": 64, "n_registers": 4, "pooling": "cls+dist", "layer_scale": True}
    model = VisionTransformer(ViTConfig(**options))
    for start in (model.cls_token, model.dist_token, model.registers, model.pos_embedding):
        assert start is not None
        assert start.std().item() == pytest.approx(1.0, abs=0.3)
    assert all(torch.equal(block.ls1.gamma, torch.ones(64)) for block in model.blocks)


def test_pooling_by_attention_has_one_query_biases_and_no_dropout() -> None:
    model = VisionTransformer(ViTConfig(**TINY, pooling="map", dropout=0.5))
    assert model.map_pool is not None
    shapes = {name: tuple(p.shape) for name, p in model.map_pool.named_parameters()}
    attn = {f"attn.{w}.{n}" for w in ("wq", "wk", "wv", "wo") for n in ("weight", "bias")}
    rest = {f"{m}.{n}" for m in ("norm", "ffn.w1", "ffn.w2") for n in ("weight", "bias")}
    assert shapes.keys() == {"query", *attn, *rest}
    assert shapes["query"] == (1, 1, 16)
    x = torch.randn(2, 5, 16)
    assert torch.equal(model.map_pool.train()(x), model.map_pool.eval()(x))


def test_a_norm_after_pooling_is_not_in_the_tokens() -> None:
    model = made({"final_norm": "after", "pooling": "mean"})
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features = model.norm(model.tokens(images).mean(dim=1))
    torch.testing.assert_close(model.features(images), features)


def expected_names(config: ViTConfig) -> set[str]:
    """Return the names of the tensors that a model of these options has."""

    def both(*modules: str, bias: bool = True) -> set[str]:
        return {f"{m}.{t}" for m in modules for t in ("weight", "bias")[: 1 + bias]}

    names = both("head", bias=config.head_bias) | {f"{t}_token" for t in config.special_tokens}
    names |= {"registers"} if config.n_registers else set()
    names |= {"pos_embedding"} if config.pos == "learned" else set()
    names |= {"rope.periods"} if config.rope_theta else set()
    names |= both("pre_norm") if config.pre_norm else set()
    names |= both("norm") if config.final_norm != "none" else set()
    if config.stem == "linear":
        names |= both("patch_embed", bias=config.patch_bias)
    else:
        names |= both(*(f"patch_embed.{m}" for m in ("conv_norm1", "conv_norm2", "conv3")))
        names |= both("patch_embed.conv1", "patch_embed.conv2", bias=False)
    if config.pooling == "map":
        own = [*(f"attn.{w}" for w in ("wq", "wk", "wv", "wo")), "norm", "ffn.w1", "ffn.w2"]
        names |= both(*(f"map_pool.{m}" for m in own)) | {"map_pool.query"}
    for i in range(config.n_layers):
        block, linears = f"blocks.{i}", ["w1", "w2", "w3"][: 2 + config.gated]
        names |= both(*(f"{block}.attn.{w}" for w in ("wq", "wk", "wv")), bias=config.qkv_bias)
        names |= both(f"{block}.attn.wo", bias=config.proj_bias)
        names |= both(f"{block}.norm1", f"{block}.norm2", *(f"{block}.ffn.{w}" for w in linears))
        names |= {f"{block}.ls{j}.gamma" for j in (1, 2)} if config.layer_scale else set()
    return names


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_has_the_tensors_of_its_options_and_no_others(options: dict[str, Any]) -> None:
    model = made(options)
    assert model.state_dict().keys() == expected_names(model.config)


def test_parts_by_themselves_have_the_articles_defaults() -> None:
    attention, x = Attention(dim=8, n_heads=2), torch.randn(2, 3, 8)
    assert attention.state_dict().keys() == {f"{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    assert attention(x).shape == (2, 3, 8)
    ffn = FeedForward(dim=8, hidden_dim=4, dropout=0.0)
    torch.testing.assert_close(ffn(x), ffn.w2(ACTS["gelu"](ffn.w1(x))))
    patches = PatchEmbed(patch_size=2, n_channels=1, dim=3)
    assert patches.bias is not None
    assert PatchEmbed(patch_size=2, n_channels=1, dim=3, bias=False).bias is None
    config = ViTConfig(**TINY, pooling="cls+dist")
    x = torch.randn(2, 6, 16)  # all tokens, where a last block gives two
    assert torch.equal(reduce_tokens(x, config), torch.cat([x[:, 0], x[:, 1]], dim=1))
