"""What other libraries' models compute, ours compute: tokens, features, logits, at two sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.sources import HF, TIMM, hf_model, timm_model
from vitft import load_model

X = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LARGER = torch.randn(1, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def hf_output(model: Any, name: str, images: Tensor) -> Any:
    """Return the output of a model of transformers for images of any size."""
    options: dict[str, Any] = {}
    if name == "mae":  # keeps the patches in their order
        n = (images.shape[-1] // 8) ** 2
        options["noise"] = torch.arange(n, dtype=images.dtype).expand(len(images), n)
    if not name.startswith("dinov"):
        options["interpolate_pos_encoding"] = True
    return model(images, **options)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("images", [X, LARGER], ids=["native", "larger"])
@torch.no_grad()
def test_a_model_of_transformers_is_computed(name: str, images: Tensor, tmp_path: Path) -> None:
    theirs = hf_model(name, tmp_path)
    ours = load_model(tmp_path)
    ours.resize(images.shape[-1])
    single = ours.tokens(images.float())
    theirs, ours = theirs.double(), ours.double()
    found = hf_output(theirs, name, images)
    # transformers rounds DINOv3's coordinates to float32; our file rounds DeiT's joined biases
    atol = 1e-7 if name.startswith(("dinov3", "deit of")) else 1e-10
    if name.startswith("dinov2") and images is LARGER:
        atol = 1e-6  # transformers resizes these positions in float32
    tokens = ours.tokens(images)
    close(single.double(), tokens, 1e-4)
    if (hidden := getattr(found, "last_hidden_state", None)) is not None:
        close(tokens, hidden, atol)
    for key in ("logits", "image_embeds"):
        if (logits := getattr(found, key, None)) is not None:
            close(ours(images), logits, atol)
    if name in ("clip", "siglip"):
        close(ours.features(images), found.pooler_output)
    if name.startswith("dinov2") and hidden is not None:
        patches = hidden[:, 5 if "registers" in name else 1 :]
        close(ours.features(images), torch.cat([hidden[:, 0], patches.mean(1)], 1), atol)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_a_model_of_timm_is_computed(name: str, tmp_path: Path) -> None:
    theirs = timm_model(name, tmp_path)
    ours = load_model(tmp_path)
    close(ours.tokens(X.float()).double(), theirs.forward_features(X.float()).double(), 1e-4)
    theirs, ours = theirs.double(), ours.double()
    close(ours.tokens(X), theirs.forward_features(X))
    logits = ours(X) if theirs.num_classes else ours.features(X)
    close(logits, theirs(X), 1e-7 if name == "deit distilled" else 1e-10)
    if name not in ("siglip", "siglip tanh") and hasattr(theirs, "set_input_size"):
        theirs.set_input_size((48, 48))
        ours.resize(48)
        close(ours.tokens(LARGER), theirs.forward_features(LARGER), 1e-5)


def test_another_shape_than_a_square_is_refused(tmp_path: Path) -> None:
    hf_model("dinov2", tmp_path)
    model = load_model(tmp_path)
    for compute in (model, model.tokens, model.features):
        with pytest.raises(ValueError, match=r"images have shape \(1, 3, 48, 32\), but the model"):
            compute(torch.zeros(1, 3, 48, 32))
        with pytest.raises(ValueError, match=r"images have shape \(1, 3, 40, 40\), but the model"):
            compute(torch.zeros(1, 3, 40, 40))
