import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.shared import TINY
from vitft import load_model, save_model
from vitft.model.blocks import MAX_PLAIN, attend
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer


def reference(state: dict[str, Tensor], config: ViTConfig, image: Tensor) -> Tensor:
    """Return the logits (n_classes,) of one image, by loops over patches, heads and blocks."""
    p, tokens = config.patch_size, [state["cls_token"][0, 0]]
    for row in range(0, config.image_size, p):
        for column in range(0, config.image_size, p):
            patch = image[:, row : row + p, column : column + p].reshape(-1)
            tokens.append(state["patch_embed.weight"] @ patch + state["patch_embed.bias"])
    x = torch.stack(tokens) + state["pos_embedding"][0]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    k = config.dim // config.n_heads
    for i in range(config.n_layers):
        block = f"blocks.{i}"
        y, heads = norm(x, f"{block}.norm1"), []
        for h in range(config.n_heads):
            rows = slice(h * k, (h + 1) * k)
            q, key, v = (y @ state[f"{block}.attn.{w}.weight"][rows].T for w in ("wq", "wk", "wv"))
            weights = torch.exp(q @ key.T / math.sqrt(k))
            heads.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + torch.cat(heads, dim=1) @ state[f"{block}.attn.wo.weight"].T
        y = (
            norm(x, f"{block}.norm2") @ state[f"{block}.ffn.w1.weight"].T
            + state[f"{block}.ffn.w1.bias"]
        )
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ state[f"{block}.ffn.w2.weight"].T + state[f"{block}.ffn.w2.bias"]
    return state["head.weight"] @ norm(x, "norm")[0] + state["head.bias"]


def test_logits_equal_an_independent_reference(tiny: VisionTransformer) -> None:
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = torch.stack([reference(tiny.state_dict(), tiny.config, image) for image in images])
    torch.testing.assert_close(tiny(images), expected, rtol=0, atol=1e-12)


def test_default_sizes_are_the_articles() -> None:
    assert sum(p.numel() for p in VisionTransformer().parameters()) == 3_189_002
    assert ViTConfig().n_patches == 64


def test_names_are_the_contracts(tiny: VisionTransformer) -> None:
    names = set(tiny.state_dict())
    block = [f"attn.{w}.weight" for w in ("wq", "wk", "wv", "wo")]
    block += [
        f"{n}.{t}" for n in ("norm1", "norm2", "ffn.w1", "ffn.w2") for t in ("weight", "bias")
    ]
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in block} | {
        "cls_token",
        "pos_embedding",
    }
    expected |= {f"{n}.{t}" for n in ("patch_embed", "norm", "head") for t in ("weight", "bias")}
    assert names == expected


@pytest.mark.parametrize(("pooling", "n_tokens"), [("cls", 1), ("mean", 4)])
def test_the_last_block_computes_only_what_the_head_reads(pooling: str, n_tokens: int) -> None:
    model = VisionTransformer(ViTConfig(**TINY, pooling=pooling))
    shapes = []
    model.blocks[-1].ffn.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    model(torch.randn(2, 3, 8, 8))
    assert shapes == [(2, n_tokens, 16)]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_logits_are_the_same_bit_for_bit_with_and_without_autograd(pooling: str) -> None:
    model = VisionTransformer(ViTConfig(dim=64, n_layers=2, pooling=pooling)).eval()
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(model(images), expected)
    assert torch.equal(model.requires_grad_(False)(images), expected)


def test_a_patch_is_flattened_like_a_convolutions_kernel(tiny: VisionTransformer) -> None:
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    kernel = tiny.patch_embed.weight.view(-1, 3, 4, 4)
    expected = F.conv2d(images, kernel, tiny.patch_embed.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tiny.patch_embed(images), expected)


def test_a_convolutional_stem_makes_as_many_tokens_and_reloads(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(**TINY, stem="conv", dropout=0.0)).eval()
    images = torch.randn(2, 3, 8, 8)
    assert model.patch_embed(images).shape == (2, 4, 16)
    save_model(model, tmp_path / "base.safetensors")
    assert torch.equal(load_model(tmp_path / "base.safetensors")(images), model(images))


def test_without_positions_mean_pooling_ignores_the_order_of_patches() -> None:
    model = VisionTransformer(ViTConfig(**TINY, pooling="mean", dropout=0.0)).double().eval()
    torch.nn.init.zeros_(model.pos_embedding)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    swapped = torch.cat([images[..., 4:], images[..., :4]], dim=-1)
    torch.testing.assert_close(model(images), model(swapped))
    assert "cls_token" not in model.state_dict()


def test_positions_of_another_size_are_interpolated(tiny: VisionTransformer) -> None:
    before = tiny.state_dict()
    tiny.resize(16)
    assert tiny(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, 3)
    assert torch.equal(
        tiny.positions()[:, :1], tiny.pos_embedding[:, :1]
    )  # the class token's stays
    tiny.resize(8)
    assert tiny.positions() is tiny.pos_embedding
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_a_new_head_has_a_logit_for_each_class(tiny: VisionTransformer) -> None:
    tiny.new_head(("cat", "dog"))
    assert tiny(torch.randn(1, 3, 8, 8, dtype=torch.float64)).tolist() == [[0.0, 0.0]]
    assert tiny.classes == ("cat", "dog")


def test_normalize_takes_out_mean_and_std(tiny: VisionTransformer) -> None:
    tiny.mean, tiny.std = (0.0, 0.5, 1.0), (1.0, 0.5, 2.0)
    image = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert tiny.normalize(image).flatten().tolist() == [1.0, 1.0, 0.0]


def test_it_compiles_without_graph_breaks() -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0)).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30}, r"dim=30 is not divisible by n_heads=8; choose n_heads from \[1, 2, 3, 5, 6"),
        (
            {"patch_size": 5},
            r"image_size=32 is not divisible by patch_size=5; .*\[1, 2, 4, 8, 16, 32",
        ),
        ({"n_layers": 0}, "n_layers=0 is not positive; the article's is 6"),
        ({"dropout": 1.0}, "dropout=1.0 is not in 0 <= dropout < 1"),
        ({"pooling": "max"}, "pooling='max' is unknown; choose"),
        ({"stem": "resnet"}, "stem='resnet' is unknown; choose"),
        ({"stem": "conv", "patch_size": 1}, "patch_size=1 is odd"),
    ],
)
def test_wrong_sizes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 1, 8, 8), (3, 8, 8), (1, 3, 8, 4)])
def test_images_of_a_wrong_shape_are_refused(
    tiny: VisionTransformer, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        ValueError, match=r"images have shape .* but the model takes \(batch, 3, 8, 8\)"
    ):
        tiny(torch.zeros(shape, dtype=torch.float64))


def test_an_image_size_that_patches_do_not_fill_is_refused(tiny: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"image_size=10 is not a positive multiple .* try 8"):
        tiny.resize(10)


@pytest.mark.parametrize("size", [4, 12, 16, 24])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_positions_of_another_size_are_timms(size: int, pooling: str) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = VisionTransformer(ViTConfig(**TINY, pooling=pooling))
    n_prefix, n = int(pooling == "cls"), size // 4
    model.resize(size)
    expected = timm_layers.resample_abs_pos_embed(
        model.pos_embedding, [n, n], num_prefix_tokens=n_prefix
    )
    torch.testing.assert_close(model.positions(), expected, rtol=0, atol=1e-6)


def test_a_model_in_16_bits_takes_its_own_images_at_any_size() -> None:
    model = VisionTransformer(ViTConfig(**TINY)).eval()
    low = copy.deepcopy(model).bfloat16()
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    for one in (model, low):
        one.resize(12)
    logits = low(low.normalize(pixels))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(model.normalize(pixels)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("n_tokens", [1, 7, 65, MAX_PLAIN, MAX_PLAIN + 1])
def test_attention_in_16_bits_is_attention_to_16_bits(n_tokens: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 6, requires_grad=True) for n in (3, n_tokens, n_tokens))
    expected = F.scaled_dot_product_attention(q, k, v)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)
    for one, two in zip(
        torch.autograd.grad((found * direction).sum(), (q, k, v)), wanted, strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0.03 * two.abs().max().item())
