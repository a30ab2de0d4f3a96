"""How a source prepares pictures, whatever the age and the options of its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families.sources import hf_model, timm_model
from tests.shared import Run
from vitft import load_model
from vitft.families.huggingface import KINDS
from vitft.families.preparing import ONE_SIDE, PROCESSORS
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
        ("vit", {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "resample": None}),
        ("vit", {"size": SQUARE, "resample": 0}),
        ("siglip", {"image_processor_type": "SiglipImageProcessor", "size": [32, 32]}),
        ("dinov2", {"size": {"shortest_edge": 37}, "crop_size": SQUARE, "resample": 1}),
        ("dinov2", {"size": {"shortest_edge": 35}, "crop_size": SQUARE, "resample": None}),
        ("deit", {"size": {"height": 37, "width": 37}, "crop_size": SQUARE, "resample": None}),
        ("dinov3", {"size": SQUARE, "resample": None, "image_mean": None, "image_std": None}),
    ],
)
def test_transformers_prepares_a_picture_alike(
    name: str, written: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    hf_model(name, tmp_path)
    entries = {key: value for key, value in (OLD | written).items() if value is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = load_model(tmp_path)
    rounding = 2.01 / 255 / min(model.std)  # of Pillow's kernels, beside torch's
    for size in ((50, 70), (71, 40), (20, 90), (9, 7)):
        picture = photograph(*size)
        expected = processor(picture, return_tensors="pt")["pixel_values"].float()
        found = model.normalize(Fit.of(model)(picture)[None])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=rounding)


def photograph(width: int, height: int) -> Image.Image:
    """Return smooth colours, as photographs have them."""
    small = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_processors_file_may_lack_is_its_classs(name: str) -> None:
    import transformers

    kind = getattr(transformers, f"{name}ImageProcessor")
    for key, value in ({"do_center_crop": None} | PROCESSORS[name]).items():
        found = getattr(kind, key, None)
        assert (tuple(found) if isinstance(found, list) else found or None) == value
    assert (kind.default_to_square is False) == (name in ONE_SIDE)


@pytest.mark.parametrize("name", KINDS)
def test_a_processor_without_a_name_is_that_of_its_model(name: str) -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    theirs = IMAGE_PROCESSOR_MAPPING_NAMES.get(name.removesuffix("_vision_model"))
    expected = "BitImageProcessor" if name == "dinov2_with_registers" else None
    found = theirs["torchvision"] if theirs else expected
    assert found == f"{KINDS[name].processor}ImageProcessor"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"size": {"shortest_edge": 20}}, "crop_size=32 of size=20 leaves a black margin"),
        ({"do_center_crop": False}, "without do_center_crop gives images that are not square"),
        ({"do_resize": False}, "do_resize=False with do_center_crop=True is not covered"),
        ({"do_pad": True}, "do_pad=True is not covered"),
        ({"size": {"height": 32, "width": 40}}, "size={'height': 32, 'width': 40} is not covered"),
        ({"size": {"shortest_edge": 36, "longest_edge": 40}}, "'longest_edge': 40} is not covered"),
        ({"crop_size": {"shortest_edge": 32}}, "crop_size={'shortest_edge': 32} is not covered"),
        (
            {"image_processor_type": "ViTImageProcessor", "crop_size": None}
            | {"do_center_crop": True, "size": SQUARE},
            "do_center_crop=True without crop_size is not covered",
        ),
        ({"resample": 7}, "the kernel 7 is not covered; there are nearest, lanczos"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image processor 'ConvNext' is not"),
    ],
)
def test_what_transformers_would_prepare_otherwise_is_named(
    written: dict[str, Any], told: str, tmp_path: Path
) -> None:
    hf_model("dinov2", tmp_path)
    usual = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | written))
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path)


def test_a_processor_that_resizes_nothing_takes_pictures_of_the_models_size(tmp_path: Path) -> None:
    hf_model("vit", tmp_path)
    written = {"do_resize": False, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    model, picture = load_model(tmp_path), photograph(32, 32)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(Fit.of(model)(picture), pixels)


def test_another_size_than_that_of_the_processor_is_said(tmp_path: Path, vitft: Run) -> None:
    hf_model("dinov2", tmp_path / "source")
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(sizes))
    assert load_model(tmp_path / "source").image_size == 32
    run = ["finetune", "--adapter=linear", "--base", tmp_path / "source", "--data=shapes"]
    run += ["--limit=20", "--epochs=1"]
    said = "takes images of 32 pixels, but its library prepares those of 16: --image-size 16 does s"
    assert said in vitft(*run, "--out", tmp_path / "a").stderr
    assert said not in vitft(*run, "--out", tmp_path / "b", "--image-size=16").stderr
    run[3] = tmp_path / "base.safetensors"
    vitft("convert", tmp_path / "source", "--image-size=16", "--out", run[3])
    assert "its library prepares" not in vitft(*run, "--out", tmp_path / "c").stderr


def test_a_processor_of_images_and_texts_counts_first(tmp_path: Path) -> None:
    hf_model("clip", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"resample": 1}))
    assert load_model(tmp_path).framing.kernel == "lanczos"
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "x"}))
    assert load_model(tmp_path).framing.kernel == "lanczos"
    both = {"image_processor": {"resample": 2, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    model = load_model(tmp_path)
    assert (model.framing.kernel, model.mean) == ("draft-bilinear", (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "written",
    [
        {"interpolation": "lanczos", "crop_pct": 1.0},
        {"interpolation": "nearest", "crop_mode": "squash"},
        {"interpolation": "box", "crop_mode": "border", "crop_pct": 1.0},
        {"interpolation": "hamming", "crop_mode": "border"},
        {"crop_pct": 0.9, "mean": [0.4], "std": [0.2]},
    ],
)
def test_timm_prepares_a_picture_of_any_shape_alike(
    written: dict[str, Any], vitft: Run, tmp_path: Path
) -> None:
    import timm

    (tmp_path / "source").mkdir()
    timm_model("vit", tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "mean": [0.4, 0.5, 0.6]} | written
    file.write_text(json.dumps(config))
    flags = ["--base", tmp_path / "source", "--format=timm", "--out", tmp_path / "back"]
    vitft("export", *flags)
    for folder in (tmp_path / "source", tmp_path / "back"):
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=False, **config["model_args"])
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
        model = load_model(folder)
        for size in ((50, 70), (71, 40), (20, 90), (9, 7)):
            found = model.normalize(Fit.of(model)(photograph(*size))[None])[0]
            expected = transform(photograph(*size))
            rounding = 2.01 / 255 / min(model.std)  # of torch's kernels, beside Pillow's
            torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"crop_pct": 1.1}, "crop_pct=1.1 leaves a black margin"),
        ({"interpolation": "random"}, "the kernel 'random' is not covered"),
        ({"input_size": [3, 32, 48]}, r"images of \[32, 48\] pixels are not covered"),
    ],
)
def test_what_timm_would_prepare_otherwise_is_named(
    written: dict[str, Any], told: str, tmp_path: Path
) -> None:
    timm_model("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= written
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        load_model(tmp_path)


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
