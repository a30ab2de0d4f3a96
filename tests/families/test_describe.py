"""What no tensor tells: heads, eps, activation, pooling, as the source's library has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.families.sources import HF, hf_model, save, timm_model
from tests.shared import long, some
from vitft import load_model
from vitft.families.architectures import describe_architecture
from vitft.families.huggingface import ACTS, KINDS

TIMM_ACTS = {"gelu": "GELU", "gelu_tanh": "GELUTanh", "quick_gelu": "QuickGELU", "silu": "SiLU"}


def covered() -> list[str]:
    """Return the architectures of timm that are not refused by their names."""
    import timm

    names = []
    for name in timm.list_models():
        try:
            describe_architecture(name, {}, {"patch_embed.proj.weight": torch.empty(768, 0)})
        except ValueError as error:
            if "heads" not in str(error):
                continue
        names.append(name)
    return names


def told(model: Any) -> dict[str, Any]:
    """Return what timm's model has."""
    act = model.blocks[0].mlp.act
    return {
        "n_heads": model.blocks[0].attn.num_heads,
        "eps": model.blocks[0].norm1.eps,
        "act": next(ours for ours, theirs in TIMM_ACTS.items() if type(act).__name__ == theirs),
        "pooling": {"token": "cls", "avg": "mean", "map": "map"}[model.global_pool],
    }


@long
def test_every_architecture_of_timm_is_described_right_or_refused() -> None:
    """One of sixteen in the whole suite; `make families` looks at all."""
    import timm

    names = covered()
    assert len(names) > 100
    for name in some(names, 16):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        if "patch_embed.proj.weight" not in model.state_dict():
            continue  # such as patches of a small ResNet, which are refused
        _, options = describe_architecture(name, {}, model.state_dict())
        expected = told(model)
        distilled = "distilled" in name  # without heads, timm takes the mean of two tokens
        if expected["act"] == "silu":  # of a gate
            del expected["act"]
        assert {key: options[key] for key in expected} == expected or distilled, name
        assert isinstance(model.blocks[0].norm1, nn.LayerNorm), name


@pytest.mark.parametrize("name", KINDS)
def test_the_defaults_of_transformers_are_ours(name: str) -> None:
    import transformers

    config, kind = transformers.AutoConfig.for_model(name), KINDS[name]
    config = getattr(config, "vision_config", config)
    assert config.hidden_act == kind.act
    assert config.hidden_act in ACTS
    assert config.layer_norm_eps == kind.eps
    assert config.num_attention_heads == kind.n_heads
    assert config.image_size == 224
    assert getattr(config, "rope_theta", None) in (None, 100.0)


@pytest.mark.parametrize("name", ["siglip", "clip projected", "dinov3 gated", "dinov2 giant"])
def test_entries_that_equal_the_default_may_be_missing(name: str, tmp_path: Path) -> None:
    import transformers

    model = hf_model(name, tmp_path, **DEFAULT_HEADS.get(name, {}))
    file = tmp_path / "config.json"
    config, usual = json.loads(file.read_text()), getattr(transformers, HF[name][1])().to_dict()
    kept = ("model_type", "hidden_size")
    short = {k: v for k, v in config.items() if k in kept or v != usual.get(k)}
    expected = load_model(tmp_path)
    file.write_text(json.dumps(short))
    assert load_model(tmp_path).config == expected.config
    if name == "siglip":
        file.write_text(json.dumps({"model_type": "siglip", "vision_config": short}))
        assert load_model(tmp_path).config == expected.config
        assert expected.config.act == "gelu_tanh"
    assert model is not None


DEFAULT_HEADS: dict[str, dict[str, Any]] = {
    "siglip": {"hidden_size": 48, "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh"},
    "dinov3 gated": {"hidden_size": 48, "num_attention_heads": 6, "hidden_act": "gelu"},
}


@torch.no_grad()
def test_a_gated_dinov3_may_have_another_activation(tmp_path: Path) -> None:
    theirs = hf_model("dinov3 gated", tmp_path, hidden_act="gelu").double()
    ours, x = load_model(tmp_path).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert (ours.config.gated, ours.config.gate) == (True, "gelu")
    torch.testing.assert_close(ours.tokens(x), theirs(x).last_hidden_state, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_pool": "avgmax"}, "global_pool 'avgmax' is not covered; there are token, avg"),
        ({"model_args": {"qk_norm": True}}, "model_args qk_norm=True is not covered"),
        ({"architecture": "vit_base_patch16_lingbot"}, "'vit_base_patch16_lingbot' is not covered"),
    ],
)
def test_what_timm_would_compute_otherwise_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    timm_model("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@torch.no_grad()
def test_a_mean_with_its_own_norm_and_without_a_head_is_computed(tmp_path: Path) -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(
        "vit_small_patch16_224", **sizes, num_classes=0, global_pool="avg"
    ).eval()
    config = {"architecture": "vit_small_patch16_224.x", "model_args": {"num_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"global_pool": "avg"}))
    save(theirs.state_dict(), tmp_path / "model.safetensors")
    ours, x = load_model(tmp_path), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.features(x), theirs(x), rtol=0, atol=1e-5)
