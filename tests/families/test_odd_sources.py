"""Folders that are odd, and valid: each is computed as by its library and goes back, or named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.families.sources import MLP, hf_model, save, shaken, timm_model
from vitft import load_model
from vitft.families.check import difference, output
from vitft.families.write import write_source

X = torch.randn(2, 3, 32, 32, dtype=torch.float64)
TEXT = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
CLIP = {"vision_config": MLP, "text_config": TEXT | {"hidden_size": 16}, "projection_dim": 5}
SIGLIP = {
    "vision_config": MLP,
    "text_config": TEXT | {"hidden_size": 32, "projection_size": 32},
}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
# class in transformers, class of its config, arguments, and the class that the way back has
ODD: list[tuple[str, str, dict[str, Any], str]] = [
    ("CLIPModel", "CLIPConfig", CLIP, "CLIPVisionModelWithProjection"),
    ("SiglipModel", "SiglipConfig", SIGLIP, "SiglipVisionModel"),
    ("CLIPForImageClassification", "CLIPConfig", CLIP | LABELS, "CLIPForImageClassification"),
    ("SiglipForImageClassification", "SiglipConfig", SIGLIP | LABELS, ""),
    ("DINOv3ViTModel", "DINOv3ViTConfig", MLP | {"num_register_tokens": 0}, "DINOv3ViTModel"),
]


@pytest.mark.parametrize(("kind", "config", "arguments", "written"), ODD)
@torch.no_grad()
def test_an_odd_model_of_transformers_is_computed_and_goes_back(
    kind: str, config: str, arguments: dict[str, Any], written: str, tmp_path: Path
) -> None:
    import transformers

    made = getattr(transformers, config)(**arguments)
    theirs = shaken(getattr(transformers, kind)(made))
    theirs.save_pretrained(tmp_path / "source")
    ours = load_model(tmp_path / "source")
    write_source(ours, tmp_path / "back", "hf")
    assert difference(ours, tmp_path / "back", "hf", X.float()) < 1e-5
    again = load_model(tmp_path / "back")
    assert all(torch.equal(t, ours.state_dict()[key]) for key, t in again.state_dict().items())
    theirs, ours = theirs.double(), ours.double()
    if kind in ("CLIPModel", "SiglipModel"):
        expected = theirs.get_image_features(X).pooler_output
    elif kind == "CLIPForImageClassification":
        expected = theirs(X).logits
    else:
        expected = output(theirs, X)
    found = ours(X) if ours.has_head else ours.features(X)
    found = ours.tokens(X) if expected.ndim == 3 else found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    config_back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config_back["architectures"] == [written or kind]


def test_pickles_in_several_files_are_read_and_one_file_counts_first(tmp_path: Path) -> None:
    hf_model("vit of classes", tmp_path)
    whole = tmp_path / "model.safetensors"
    tensors, expected = load_file(whole), load_model(tmp_path).state_dict()
    index, names = {}, [*tensors]
    for i in range(2):
        file = f"pytorch_model-{i}.bin"
        torch.save({name: tensors[name] for name in names[i::2]}, tmp_path / file)
        index |= dict.fromkeys(names[i::2], file)
    whole.unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "y"}}))
    save(tensors, whole)
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("dinov3", {"use_rot_pos_emb": False}, "model_args use_rot_pos_emb=False is not covered"),
        ("vit", {"img_size": [32, 48]}, r"images of \[32, 48\] pixels are not covered"),
    ],
)
def test_what_timm_would_compute_otherwise_is_named(
    name: str, arguments: dict[str, Any], told: str, tmp_path: Path
) -> None:
    timm_model(name, tmp_path, **arguments)
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path)
