"""Folders and files as they come: sharded, pickled, original, broken, or of other families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.convert import at_size
from tests.families.sources import hf_model, save, timm_model
from tests.shared import TINY, Run, long
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.families.names import FAMILIES
from vitft.families.rename import ours_of

X = torch.randn(2, 3, 32, 32)
PATCH = "patch_embed.proj.weight"
PLAIN = (PATCH, "blocks.0.attn.qkv.weight", "pos_embed", "cls_token")


def same(one: VisionTransformer, other: VisionTransformer) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(X), other(X), rtol=0, atol=1e-6)
        torch.testing.assert_close(one.tokens(X), other.tokens(X), rtol=0, atol=1e-6)


def test_a_converted_file_is_what_was_converted(vitft: Run, tmp_path: Path) -> None:
    hf_model("dinov2 registers", tmp_path / "source")
    out = tmp_path / "base.safetensors"
    done = vitft("convert", tmp_path / "source", "--out", out)
    assert "family          hf-dinov2" in done.stdout
    same(load_model(out), load_model(tmp_path / "source"))
    told = json.loads(vitft("inspect", out, "--json").stdout)
    assert told["source"]["checksum"] == load_model(tmp_path / "source").facts["checksum"]


@long
def test_the_default_rate_is_a_known_backbones(vitft: Run, folder: Path, tmp_path: Path) -> None:
    hf_model("dinov2", tmp_path / "source")
    vitft("convert", tmp_path / "source", "--out", tmp_path / "base.safetensors")
    rates = {}
    for base in (tmp_path / "source", tmp_path / "base.safetensors", "cifar10"):
        flags = ["--adapter=lora", "--rank=1", "--epochs=1", "--limit=3", "--batch-size=3"]
        out = tmp_path / f"run {len(rates)}"
        vitft("finetune", *flags, "--base", base, "--data", folder, "--out", out)
        rates[str(base)] = json.loads((out / "config.json").read_text())["lr"]
    assert [*rates.values()] == [1e-3, 1e-3, 3e-3]


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "vit"])
def test_positions_are_resized_for_good(name: str, vitft: Run, tmp_path: Path) -> None:
    hf_model(name, tmp_path / "source")
    out, images = tmp_path / "base.safetensors", torch.randn(1, 3, 48, 48)
    vitft("convert", tmp_path / "source", "--out", out, "--image-size", 48)
    model, source = load_model(out), load_model(tmp_path / "source")
    source.resize(48)
    assert model.config.image_size == model.image_size == 48
    torch.testing.assert_close(model.tokens(images), source.tokens(images), rtol=0, atol=1e-5)
    assert model.facts["positions_resized_from"] == 32
    parameters = dict(source.named_parameters())
    assert {n: p.requires_grad for n, p in at_size(source, 32).named_parameters()} == {
        n: True for n in parameters
    }


def test_classes_come_along(tmp_path: Path) -> None:
    labels = {
        "id2label": {0: "ant", 1: "bee", 2: "cat"},
        "label2id": {"ant": 0, "bee": 1, "cat": 2},
    }
    hf_model("vit of classes", tmp_path, **labels)
    assert load_model(tmp_path).classes == ("ant", "bee", "cat")


def test_names_that_stand_twice_come_along_and_go_back(vitft: Run, tmp_path: Path) -> None:
    labels = {"0": "crane", "1": "bee", "2": "crane"}  # twice, as in ImageNet: a bird and a machine
    hf_model("vit of classes", tmp_path / "source", id2label=labels, label2id={})
    vitft("convert", tmp_path / "source", "--out", tmp_path / "base.safetensors")
    assert load_model(tmp_path / "base.safetensors").classes == ("crane", "bee", "crane (2)")
    flags = ["--base", tmp_path / "base.safetensors", "--format=hf", "--out", tmp_path / "back"]
    vitft("export", *flags)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["id2label"] == labels


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_norm_eps": "small"}, "layer_norm_eps: Expected float"),
        ({"layer_norm_eps": 0}, "eps=0 is not in 0 < eps < 1"),
        ({"num_attention_heads": True}, "num_attention_heads: Expected int"),
        ({"hidden_act": {"a": 1}}, "hidden_act: Expected str"),
        ({"image_size": [32, 48]}, r"images of \[32, 48\] pixels are not covered; square ones are"),
        ({"id2label": {"first": "ant"}}, "a key of id2label is no number"),
        ({"pretrained_cfg": 3}, "pretrained_cfg: Expected"),
        ({"model_type": "segformer", "num_attention_heads": [1, 2]}, "'segformer' is not covered"),
    ],
)
def test_an_odd_entry_is_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    hf_model("vit of classes", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path)


def test_classes_may_be_called_by_numbers(tmp_path: Path) -> None:
    hf_model("vit of classes", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    odd = {"id2label": {"0": 7, "1": 8.5, "2": True}, "an unread entry": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps(config | odd))
    assert load_model(tmp_path).classes == ("7", "8.5", "True")


def test_null_counts_as_left_out(tmp_path: Path) -> None:
    model = hf_model("vit of classes", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    nulls = {"layer_norm_eps": None, "license": None, "id2label": None}
    (tmp_path / "config.json").write_text(json.dumps(config | nulls))
    assert load_model(tmp_path).config.eps == model.config.layer_norm_eps


def test_shards_are_read(tmp_path: Path) -> None:
    model = hf_model("dinov2", tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    same(load_model(tmp_path / "shards"), load_model(tmp_path / "one"))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"model": Evil()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no tensors that can be read"):
        load_model(tmp_path / "x.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"no model", bytes(99), b"PK\x03\x04"])
def test_a_file_that_is_no_pickle_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth holds no tensors that can be read \(.+\)"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, "model_type 'swin' is not covered; there are vit, deit"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act 'relu' is not covered"),
        ({"architecture": "eva02_base_patch14_224"}, "'eva02_base_patch14_224' is not covered"),
        ({"architecture": "swin_tiny_patch4_window7_224"}, "is not covered; plain ViTs are"),
        ({"architecture": "vit_pe_core_base_patch16_224"}, "is not covered"),
        ({}, "of no family that is known without a config.json"),
    ],
)
def test_what_is_not_covered_is_named(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": config.get("model_type")})
    )
    save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path if config else tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.0.extra": torch.zeros(1)}, "'encoder.layer.0.extra' has no place"),
        ({"layernorm.weight": None}, r"tensor norm\.weight is missing"),
        (
            {"layernorm.weight": torch.zeros(3)},
            r"tensor norm\.weight has shape \(3,\), not \(32",
        ),
    ],
)
def test_every_tensor_is_used_known_or_named(change: Any, message: str, tmp_path: Path) -> None:
    hf_model("vit", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | change
    save({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_base_of_the_hub_is_fetched_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model("dinov2", tmp_path)
    calls = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Dino\n")
    model = load_model("hf:someone/dino")
    same(model, load_model(tmp_path))
    assert (model.facts["source"], model.facts["licence"]) == ("hf:someone/dino", "apache-2.0")
    load_model("timm:vit_small@v1")
    assert calls == [("someone/dino", None), ("timm/vit_small", "v1")]


def test_a_file_of_ours_keeps_its_options(tmp_path: Path) -> None:
    options = {"qkv_bias": True, "n_registers": 2, "layer_scale": True, "gated": True}
    model = VisionTransformer(ViTConfig(**TINY, **options, pooling="cls+mean", dropout=0.0)).eval()
    save_model(model, tmp_path / "base.safetensors")
    again, x = load_model(tmp_path / "base.safetensors"), torch.randn(2, 3, 8, 8)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


def test_names_are_read_with_any_number() -> None:
    family = FAMILIES["timm"]
    assert ours_of("blocks.11.attn.qkv.weight", family)[1] == "blocks.11.attn.wk.weight"
    assert ours_of("blocks.2.mlp.fc1.bias", family) == ("blocks.2.ffn.w1.bias",)
    assert ours_of("blocks.2.mlp.fc9.bias", family) == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds a list, no tensors by name"),
        ({"model": 3}, "holds a int, no tensors by name"),
        ({1: torch.zeros(2)}, "of no family that is known"),
        ({"rope_embed.periods": torch.zeros(0), PATCH: torch.zeros(8, 3, 2, 2)}, "no numbers"),
        ({"visual.class_embedding": torch.zeros(3)}, "visual.conv1.weight is missing"),
        (dict.fromkeys(PLAIN, torch.zeros(384, 3, 2, 2)), "ffn.w1.weight is missing"),
        ({PATCH: torch.zeros(2).to_sparse()}, "is sparse, complex or quantized"),
    ],
)
def test_a_file_of_something_else_is_told(content: object, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["head.weight", "head_dist.bias"])
def test_two_heads_that_do_not_fit_are_told(key: str, tmp_path: Path) -> None:
    timm_model("deit distilled", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save(tensors | {key: tensors[key][None]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of its two heads do not fit each other"):
        load_model(tmp_path)
