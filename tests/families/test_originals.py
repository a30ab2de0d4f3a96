"""Files of the original repositories compute what a transcription of their models does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import originals
from tests.families.sources import save
from vitft import VisionTransformer, load_model

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=GENERATOR)
LARGER = torch.randn(1, 3, 24, 24, dtype=torch.float64, generator=GENERATOR)


def same(found: Tensor, expected: Tensor) -> None:
    # files hold float32 here, so that nothing is rounded on the way
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def rounded(tensors: originals.Tensors) -> originals.Tensors:
    """Return the tensors as float32 holds them, in float64."""
    wide = {k: t.float().double() for k, t in tensors.items() if t.dtype == torch.float64}
    return tensors | wide


def narrow(tensors: originals.Tensors) -> originals.Tensors:
    return {k: t.float() if t.dtype == torch.float64 else t for k, t in tensors.items()}


def load(content: Any, file: Path) -> VisionTransformer:
    torch.save(content, file)
    return load_model(file).double()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_a_dinov2_file(registers: bool, gated: bool, chunked: bool, tmp_path: Path) -> None:
    t = rounded(originals.dinov2_tensors(registers=registers, gated=gated, chunked=chunked))
    model = load(narrow(t), tmp_path / "dinov2.pth")
    same(model.tokens(X), expected := originals.dinov2(t, X))
    n = 5 if registers else 1
    same(model.features(X), torch.cat([expected[:, 0], expected[:, n:].mean(1)], 1))
    model.resize(24)
    same(model.tokens(LARGER), originals.dinov2(t, LARGER))


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_a_dinov3_file(gated: bool, tmp_path: Path) -> None:
    t = rounded(originals.dinov3_tensors(gated=gated))
    model = load(narrow(t), tmp_path / "dinov3.pth")
    model.resize(16)
    assert model.config.n_heads == 2
    same(model.tokens(X), expected := originals.dinov3(t, X))
    same(model.features(X), torch.cat([expected[:, 0], expected[:, 5:].mean(1)], 1))
    model.resize(24)
    same(model.tokens(LARGER), originals.dinov3(t, LARGER))


@pytest.mark.parametrize("kind", ["dino", "dino training", "mae", "mae tuned", "bare"])
@torch.no_grad()
def test_a_dino_or_mae_file(kind: str, tmp_path: Path) -> None:
    t = rounded(originals.plain_tensors())
    held: Any = narrow(t)
    if kind == "dino training":
        held = {f"module.backbone.{k}": v for k, v in held.items()}
        held = {"teacher": held | {"module.head.mlp.0.weight": torch.zeros(2, originals.DIM)}}
    elif kind == "mae":
        extra = {f"decoder_{k}": torch.zeros(3) for k in ("embed.weight", "blocks.0.norm1.bias")}
        held = {"model": held | extra | {"mask_token": torch.zeros(1, 1, 3)}, "epoch": 800}
    elif kind == "mae tuned":  # the mean of the patches, then a norm, then the head
        held |= {f"fc_norm.{k}": held.pop(f"norm.{k}") for k in ("weight", "bias")}
        held |= {"head.weight": torch.randn(3, originals.DIM), "head.bias": torch.randn(3)}
    model = load(held, tmp_path / "x.pth")
    if kind != "mae tuned":
        same(model.tokens(X), expected := originals.plain(t, X))
        same(model.features(X), expected[:, 0])
        return
    mean = originals.norm(t, "norm", model.tokens(X)[:, 1:].mean(1), 1e-6)
    same(model.features(X), mean)
    same(model(X), mean @ held["head.weight"].double().T + held["head.bias"])


@torch.no_grad()
def test_an_openai_clip_file(tmp_path: Path) -> None:
    t = rounded(originals.clip_tensors())
    marks = {"input_resolution": torch.tensor(16), "logit_scale": torch.tensor(4.6)}
    model = load(narrow(t) | marks, tmp_path / "ViT.pt")
    same(model(X), originals.clip(t, X, n_heads=3, quick=True))
    assert model.mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("config", "vision", "n_heads", "quick"),
    [
        ({}, {}, 3, False),
        ({"quick_gelu": True}, {}, 3, True),
        ({}, {"head_width": 48}, 4, False),
        ({}, {"image_size": 16, "mlp_ratio": 2.0}, 3, False),
    ],
)
@torch.no_grad()
def test_an_open_clip_folder(
    config: dict[str, Any], vision: dict[str, Any], n_heads: int, quick: bool, tmp_path: Path
) -> None:
    t = rounded(originals.clip_tensors())
    save(narrow(t) | {"logit_scale": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    written = {
        "model_cfg": {"embed_dim": 7, "vision_cfg": vision | {"width": 192}} | config,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    for source in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        model = load_model(source).double()
        same(model(X), originals.clip(t, X, n_heads=n_heads, quick=quick))
        assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (None, "tells neither its activation nor its heads; convert its folder"),
        ({"attentional_pool": True}, "vision_cfg attentional_pool=True is not covered"),
        ({"pool_type": "none"}, "pool_type 'none' is not covered; there are tok, avg"),
    ],
)
def test_what_an_open_clip_tower_does_not_tell_or_does_otherwise_is_named(
    vision: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    save(narrow(originals.clip_tensors()), tmp_path / "open_clip_model.safetensors")
    if vision is not None:
        written = {"model_cfg": {"vision_cfg": vision}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_tower_of_another_library_is_named(tmp_path: Path) -> None:
    save({"visual.trunk.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "open_clip_model.safetensors")
    written = {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="vision tower of convnext_base is not covered"):
        load_model(tmp_path)


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    tensors = narrow(originals.plain_tensors())
    tensors["patch_embed.proj.weight"] = torch.zeros(200, 3, 4, 4)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="how many heads a ViT of width 200 has is not known"):
        load_model(tmp_path / "x.pth")
