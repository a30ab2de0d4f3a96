"""Positions: tables at another size, rotary ones, and those that a model starts with."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.shared import TINY
from vitft.model.config import ViTConfig
from vitft.model.init import initialise, sincos_positions
from vitft.model.positions import AxialRope, positions_of, resize_positions
from vitft.model.vit import VisionTransformer


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("n_rows", [2, 3, 5, 8])
def test_a_table_is_resized_as_a_picture_of_each_number(
    kernel: str, antialias: bool, offset: float, n_rows: int
) -> None:
    grid = torch.randn(1, 16, 3)
    how = f"{kernel}-antialias" if antialias else kernel
    found = resize_positions(grid, n_rows, how=how, offset=offset)
    for d in range(3):
        picture = grid[0, :, d].view(1, 1, 4, 4)
        options: dict[str, Any] = {"mode": kernel, "antialias": antialias}
        options |= (
            {"scale_factor": ((n_rows + offset) / 4,) * 2} if offset else {"size": (n_rows, n_rows)}
        )
        expected = F.interpolate(picture, **options).flatten()
        torch.testing.assert_close(found[0, :, d], expected)
    plain = resize_positions(grid, n_rows, how=how, offset=0.0)
    assert torch.allclose(found, plain) is (offset == 0)
    half = resize_positions(grid.half(), n_rows, how=how, offset=offset)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), found, rtol=0, atol=0.02)


CONFIG = ViTConfig(**TINY, n_registers=2, dist_token=True)  # 4 patches after 4 other tokens


@pytest.mark.parametrize("n_own", [0, 1, 2])
def test_tokens_without_a_position_get_zeros(n_own: int) -> None:
    table = torch.randn(1, n_own + 4, 16)
    found = positions_of(table, n_own, CONFIG, 8)
    assert torch.equal(found[:, :n_own], table[:, :n_own])
    assert torch.equal(found[:, n_own:4], torch.zeros(1, 4 - n_own, 16))
    assert torch.equal(found[:, 4:], table[:, n_own:])
    larger = positions_of(table, n_own, CONFIG, 12)
    assert torch.equal(larger[:, :4], found[:, :4])
    resized = resize_positions(table[:, n_own:], 3, how="bicubic-antialias", offset=0.0)
    assert torch.equal(larger[:, 4:], resized)


def test_a_table_that_fits_is_given_as_it_is_and_none_is_zero() -> None:
    config = ViTConfig(**TINY)
    table = torch.randn(1, 5, 16)
    assert positions_of(table, 1, config, 8) is table
    assert torch.equal(positions_of(None, 1, config, 8), torch.zeros(1, 1, 1))
    options = {"pos_resize": "bilinear", "pos_offset": 0.1}
    config = ViTConfig(**TINY, **options)
    expected = resize_positions(table[:, 1:], 4, how="bilinear", offset=0.1)
    assert torch.equal(positions_of(table, 1, config, 16)[:, 1:], expected)


def rotated(x: Tensor, n_rows: int, n_prefix: int, theta: float) -> Tensor:
    """Return x (B, H, tokens, K) with its patches' numbers turned as complex ones."""
    k = x.shape[-1]
    out = torch.complex(x[..., : k // 2], x[..., k // 2 :])
    for i in range(n_rows**2):
        coordinates = [2 * (place + 0.5) / n_rows - 1 for place in divmod(i, n_rows)]
        for j in range(k // 2):
            frequency = theta ** -(4 * (j % (k // 4)) / k)
            angle = 2 * math.pi * coordinates[j // (k // 4)] * frequency
            out[:, :, n_prefix + i, j] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([out.real, out.imag], dim=-1)


@pytest.mark.parametrize(("n_rows", "n_prefix", "n_after"), [(2, 0, 0), (3, 2, 1), (4, 1, 0)])
def test_rotary_positions_turn_patches_alone(n_rows: int, n_prefix: int, n_after: int) -> None:
    rope = AxialRope(head_dim=8, theta=50.0, n_prefix=n_prefix, n_rows=n_rows)
    x = torch.randn(2, 3, n_prefix + n_rows**2 + n_after, 8, dtype=torch.float64)
    found = rope(x)
    torch.testing.assert_close(found, rotated(x, n_rows, n_prefix, 50.0))
    assert torch.equal(rope(x[:, :, :n_prefix]), x[:, :, :n_prefix])
    assert rope(x.float()).dtype == torch.float32
    torch.testing.assert_close(rope(x.float()).double(), found, rtol=0, atol=1e-5)
    assert rope.to("meta")(x.to("meta")).shape == x.shape


def test_rotary_positions_fit_their_model_at_any_size() -> None:
    config = ViTConfig(**TINY | {"dim": 32}, rope_theta=100.0, n_registers=2)
    rope = AxialRope.of(config)
    assert (rope.n_rows, rope.n_prefix) == (2, 3)
    expected = torch.tensor([100.0 ** (4 * j / 16) for j in range(4)], dtype=torch.float64)
    torch.testing.assert_close(rope.periods, expected, check_dtype=False, rtol=1e-6, atol=0)
    assert rope.periods.dtype == torch.float64
    model = VisionTransformer(config)
    assert "rope.periods" in model.state_dict()
    model.resize(16)
    assert model.rope.n_rows == 4
    assert model.blocks[0].attn.rope is model.rope
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)


def test_waves_of_column_and_row_have_moco_v3s_frequencies() -> None:
    found = sincos_positions(9, 12)
    for i in range(9):
        row, column = divmod(i, 3)
        angles = [[place / 10_000 ** (j / 3) for j in range(3)] for place in (column, row)]
        waves = [f(angle) for own in angles for f in (math.sin, math.cos) for angle in own]
        assert found[i].tolist() == pytest.approx(waves, abs=1e-6)
    message = "^dim=6 is not divisible by 4, which positions by sine and cosine need$"
    with pytest.raises(ValueError, match=message):
        sincos_positions(4, 6)


OPTIONS = {"pooling": "cls+dist", "n_registers": 3, "dropout": 0.0}


def test_small_starts_are_a_fiftieth_and_leave_the_rest() -> None:
    torch.manual_seed(0)
    before = VisionTransformer(ViTConfig(**TINY | OPTIONS))
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**TINY | OPTIONS))
    initialise(model, "small")
    starts = ("pos_embedding", "cls_token", "dist_token", "registers")
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        torch.testing.assert_close(a, b * (0.02 if name in starts else 1))
    initialise(model, "sincos")
    assert torch.equal(model.pos_embedding[:, -4:], sincos_positions(4, 16)[None])
    torch.testing.assert_close(model.pos_embedding[:, :-4], before.pos_embedding[:, :-4] * 0.02**2)
    torch.testing.assert_close(model.cls_token, before.cls_token * 0.02**2)
    bare = VisionTransformer(ViTConfig(**TINY, pos="none"))
    initialise(bare, "mimetic")  # which has no positions to set
    assert bare.pos_embedding is None


def test_mimetic_products_are_those_of_the_paper() -> None:
    config = ViTConfig(**TINY | {"dim": 64, "n_heads": 1, "n_layers": 1})
    model = VisionTransformer(config)
    initialise(model, "mimetic")
    attn = model.blocks[0].attn
    for product, scale in (
        (attn.wq.weight.T @ attn.wk.weight, 0.7),  # one head: all directions
        (attn.wo.weight @ attn.wv.weight, -0.4),
    ):
        diagonal = product.diagonal()
        assert diagonal.mean().item() == pytest.approx(scale, abs=0.05)
        rest = product - diagonal.diag()
        assert rest.std().item() == pytest.approx(abs(scale) / 8, rel=0.1)
    for one, other in (("wq", "wk"), ("wo", "wv")):  # of equal size: a root of the values each
        sizes = [getattr(attn, name).weight.norm().item() for name in (one, other)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_an_unknown_start_names_the_known() -> None:
    message = "^unknown init 'x'; choose from article, small, sincos, mimetic$"
    with pytest.raises(ValueError, match=message):
        initialise(VisionTransformer(ViTConfig(**TINY)), "x")
