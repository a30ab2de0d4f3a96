"""How a source prepares pictures, whatever the age and the options of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families.sources import hf_model, timm_model
from vitft import load_model
from vitft.pictures.preprocess import Fit

SQUARE = {"height": 32, "width": 32}
OLD = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "do_normalize": True, "resample": 2}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}),
        ("vit", {"size": 32}),
        ("dinov2", {"image_processor_type": "ViTImageProcessor", "size": 32}),
        (
            "deit",
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 36, "crop_size": 32}
            | {"do_center_crop": True},
        ),
        ("dinov2", {"size": 36, "crop_size": 32, "do_center_crop": True}),
        ("clip", {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}),
        ("vit", {"size": SQUARE, "do_normalize": False}),
        ("vit", {"size": SQUARE, "do_rescale": False}),
        ("vit", {"size": SQUARE, "rescale_factor": 1 / 100}),
        ("vit", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    ],
)
def test_transformers_prepares_a_picture_alike(
    name: str, written: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    hf_model(name, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD | written))
    pixels = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy()).resize((50, 70), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(picture, return_tensors="pt")["pixel_values"].float()
    model = load_model(tmp_path)
    found = model.normalize(Fit.of(model)(picture)[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_old", [False, True])
def test_timm_prepares_a_picture_alike(is_old: bool, tmp_path: Path) -> None:
    import timm

    timm_model("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes, own = config.pop("model_args"), {"mean": [0.4] * 3, "std": [0.3] * 3}
    own |= {"crop_pct": 0.9, "labels": ["a", "b", "c"]} if is_old else {"crop_mode": "squash"}
    del config["pretrained_cfg"], config["global_pool"]
    written = config | (own if is_old else {"pretrained_cfg": own})
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=False, **sizes)
    expected = timm.data.resolve_model_data_config(theirs)
    written = written | {"architecture": "vit_tiny_patch16_224"}
    (tmp_path / "config.json").write_text(json.dumps(written | {"model_args": {"num_heads": 2}}))
    model = load_model(tmp_path)
    assert model.mean == tuple(expected["mean"])
    assert model.std == tuple(expected["std"])
    assert model.framing.crop == expected["crop_pct"]
    assert model.framing.resize == ("shortest" if is_old else "squash")
    assert model.classes == (("a", "b", "c") if is_old else ("0", "1", "2"))
