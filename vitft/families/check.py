"""An exported folder in; the other library's model of it, and the difference of outputs, out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitft.data.named import import_torchvision
from vitft.families.rename import translate
from vitft.model.vit import VisionTransformer


def difference(model: VisionTransformer, folder: Path, library: str, images: Tensor) -> float:
    """Return the largest absolute difference between a library's output for a folder and ours.

    Args:
        model: that was exported.
        folder: that it was exported to.
        library: "hf" or "timm".
        images: normalised (B, C, height, width).

    Raises:
        ValueError: the library is not installed, does not load the folder, or its output has
            another shape.
    """
    found = output(load(folder, library, model), images)
    headless = model.features if library == "timm" else model.tokens
    expected = model(images) if model.has_head else headless(images)
    if expected.shape != found.shape:
        raise ValueError(
            f"{library} gives {tuple(found.shape)} for the folder, not {tuple(expected.shape)}"
        )
    return float((expected - found).abs().max())


def load(folder: Path, library: str, model: VisionTransformer) -> nn.Module:
    """Return a library's model of a folder that was written for it, in float32.

    Args:
        folder: loaded as its users will.
        library: "hf" or "timm".
        model: the base that was written.

    Raises:
        ValueError: the library is not installed, does not load the folder, or finds a tensor
            missing that our base needs too.
    """
    module = _import({"hf": "transformers"}.get(library, library))
    try:
        if library == "timm":
            made: nn.Module = module.create_model(f"local-dir:{folder}", pretrained=True)
            return made.eval()
        config = json.loads((folder / "config.json").read_text())
        kind, options = getattr(module, config["architectures"][0]), {"output_loading_info": True}
        with silent(module.utils.logging):
            made, info = kind.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:  # whatever another library raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{module.__name__} does not load what was written: {reason}") from error
    family, ours = str(model.facts["family"]), model.state_dict().keys()
    if missing := sorted(key for key in info["missing_keys"] if ours & {*translate(key, family)}):
        raise ValueError(f"{module.__name__} misses {missing[0]} in what was written")
    return made.eval()


@contextmanager
def silent(logging: Any) -> Iterator[None]:
    """Hide transformers' progress bars.

    Args:
        logging: the module transformers.utils.logging.
    """
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def output(theirs: nn.Module, images: Tensor) -> Tensor:
    """Return the first that a library's model has of logits, image embeddings and tokens.

    Args:
        theirs: the library's model.
        images: normalised (B, C, height, width).
    """
    options: dict[str, Any] = {}
    config = getattr(theirs, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind and not kind.startswith("dino"):
        options["interpolate_pos_encoding"] = True
    if kind == "vit_mae":  # masks no patch, and keeps their order
        assert config is not None
        config.mask_ratio, n = 0.0, (config.image_size // config.patch_size) ** 2
        options["noise"] = torch.arange(n, dtype=images.dtype).expand(len(images), n)
    found = theirs(images, **options)
    names = ("logits", "image_embeds", "last_hidden_state")
    first = next((getattr(found, name) for name in names if hasattr(found, name)), found)
    assert isinstance(first, Tensor)
    return first


def _import(name: str) -> Any:
    import_torchvision()  # first, since the library fails where its operators do not fit torch
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(f"the export is checked by {name}; install it") from error
