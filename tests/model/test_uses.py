"""What a model offers beside its logits: sizes, preprocessing, a new head, names elsewhere."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.shared import TINY
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

FRAMING = {"resize": "shortest", "crop": 1.0, "kernel": "bicubic", "range": None}
FRAMING |= {"halves": "even", "labels": "one"}


def test_a_new_model_has_neutral_names_and_preprocessing() -> None:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=3))
    assert model.classes == ("0", "1", "2")
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert model.facts == {}
    normal = {"image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert model.preprocessing == normal | FRAMING


def test_preprocessing_is_taken_from_a_record() -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    record: dict[str, Any] = {"image_size": 12, "mean": [0, 0.5, 1], "std": [1, 2, 3]}
    model.preprocessing = record
    assert model.preprocessing == {
        "image_size": 12,
        "mean": (0.0, 0.5, 1.0),
        "std": (1.0, 2.0, 3.0),
        **FRAMING,
    }
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=r"are not numbers for channels$"):
            model.preprocessing = record | {name: [0.5]}
    message = re.escape("mean=(0.5,) and std=(0.5,) are not for 3 channels")
    with pytest.raises(ValueError, match=f"^{message}$"):
        model.preprocessing = record | {"mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize(
    ("image_size", "suggested"), [(0, 4), (-4, 4), (3, 4), (5, 4), (9, 8), (11, 12), (1, 4)]
)
def test_a_size_that_patches_do_not_fill_is_refused_with_one_that_they_do(
    image_size: int, suggested: int
) -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    message = f"{image_size=} is not a positive multiple of patch_size=4; try {suggested}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.resize(image_size)
    model.resize(4)
    assert model.image_size == 4


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 12, 8), (2, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused_with_the_way_out(shape: tuple[int, ...]) -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    message = (
        f"images have shape {shape}, but the model takes (batch, 3, 8, 8); "
        "resize the images, or call model.resize(image_size)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(torch.zeros(shape))


def test_a_new_head_is_of_zeros_in_the_dtype_of_the_old_one() -> None:
    model = VisionTransformer(ViTConfig(**TINY, head_bias=False, pooling="cls+mean")).double()
    model.new_head(["a", "b"])
    assert model.classes == ("a", "b")
    assert model.head.weight.dtype == model.head.bias.dtype == torch.float64
    assert model.head.weight.shape == (2, 32)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    with torch.device("meta"):
        there = VisionTransformer(ViTConfig(**TINY))
    there.new_head(("a",))
    assert there.head.weight.is_meta


@pytest.mark.parametrize("cast", [torch.nn.Module.double, torch.nn.Module.bfloat16])
def test_pixels_are_normalised_in_at_least_float32(cast: Callable[..., Any]) -> None:
    model = cast(VisionTransformer(ViTConfig(**TINY)))
    model.mean, model.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (model.mean, model.std)
    )
    expected = (pixels.double() / 255 - mean) / std
    found = model.normalize(pixels)
    own = model.head.weight.dtype
    assert found.dtype == own
    nearest = torch.finfo(own).eps * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=nearest)


@pytest.mark.parametrize(("pooling", "n_read"), [("cls", 1), ("cls+dist", 2), ("mean", 6)])
def test_the_last_block_makes_what_the_head_reads(pooling: str, n_read: int) -> None:
    options: dict[str, Any] = {"pooling": pooling, "class_token": True, "dist_token": True}
    model = VisionTransformer(ViTConfig(**TINY, **options)).eval()
    images = torch.randn(2, 3, 8, 8)
    assert len(model.stages()) == 5
    assert model.run(images, last=2).shape == (2, 6, 16)
    assert model.run(images, last=3).shape == (2, n_read, 16)
    x = model.run(images, last=2)
    assert torch.equal(model.run(model.run(x, 2, 4), 4), model.run(x, 2))


def test_names_elsewhere_are_those_of_the_family_that_a_base_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "vitft.families.rename.translate", lambda *call: asked.append(call) or ("x",)
    )
    model = VisionTransformer(ViTConfig(**TINY))
    model.facts = {"family": "timm"}
    assert model.translate("a.b") == ("x",)
    model.facts = {}
    model.translate("c")
    assert asked == [("a.b", "timm"), ("c", "None")]
