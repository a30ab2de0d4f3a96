"""A folder of another library in, its model there; and how far its output is from ours."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitft.data.sources import import_torchvision
from vitft.model.vit import VisionTransformer


def difference(model: VisionTransformer, folder: Path, library: str, images: Tensor) -> float:
    """Return the largest difference of a library's output for a folder from the model's.

    Args:
        model: what was written.
        folder: what it was written to.
        library: "hf" or "timm".
        images: normalised (B, C, height, width).

    Raises:
        ValueError: the library is not installed.
    """
    found = output(load(folder, library, model), images)
    for ours in (model, model.features, model.tokens):
        if (expected := ours(images)).shape == found.shape:
            return float((expected - found).abs().max())
    raise ValueError(f"{library} gives {tuple(found.shape)} for the folder, which we never do")


def load(folder: Path, library: str, model: VisionTransformer) -> nn.Module:
    """Return a library's model of a folder that was written for it, in float32.

    Raises:
        ValueError: the library is not installed.
    """
    config = json.loads((folder / "config.json").read_text())
    if library == "hf":
        kind = getattr(_import("transformers"), config["architectures"][0])
        made: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)
        return made.eval()
    sizes = {
        "patch_size": model.config.patch_size,
        "embed_dim": model.config.dim,
        "depth": model.config.n_layers,
        "num_heads": model.config.n_heads,
    }
    arguments = sizes | dict(config["model_args"]) | {"global_pool": config["global_pool"]}
    made = _import("timm").create_model(
        config["architecture"].partition(".")[0],
        num_classes=config["num_classes"],
        checkpoint_path=str(folder / "model.safetensors"),
        **arguments,
    )
    return made.eval()


def output(theirs: nn.Module, images: Tensor) -> Tensor:
    """Return logits, embeddings or tokens of a library's model, whichever it gives first."""
    options: dict[str, Any] = {}
    config = getattr(theirs, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind and not kind.startswith("dino"):
        options["interpolate_pos_encoding"] = True
    if kind == "vit_mae":  # hides no patch, and leaves them in their order
        assert config is not None
        config.mask_ratio, n = 0.0, (config.image_size // config.patch_size) ** 2
        options["noise"] = torch.arange(n, dtype=images.dtype).expand(len(images), n)
    found = theirs(images, **options)
    names = ("logits", "image_embeds", "last_hidden_state")
    first = next((getattr(found, name) for name in names if hasattr(found, name)), found)
    assert isinstance(first, Tensor)
    return first


def _import(name: str) -> Any:
    import_torchvision()  # first, where its operators do not fit torch: the library gives up
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(f"the export is checked by {name}; install it") from error
