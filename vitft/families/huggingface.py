"""A Hugging Face config.json in; the family, and the options that its tensors do not show, out.

The file may lack entries that equal the defaults of transformers' config class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitft.families.records import side_of

ACTS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation


@dataclass(frozen=True)
class Kind:
    """A model_type: its family, our options, and the defaults of its config class."""

    family: str
    pooling: str
    options: Mapping[str, Any] = field(default_factory=dict)
    act: str = "gelu"
    eps: float = 1e-12
    n_heads: int = 12
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]
    processor: str = "ViT"  # its usual image processor, without "ImageProcessor"


HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = {"pos_resize": "bicubic"}
_DINOV2 = Kind("hf-dinov2", "cls+mean", _BICUBIC, eps=1e-6, processor="Bit")
_CLIP = Kind(
    "hf-clip",
    "cls",
    _BICUBIC | {"final_norm": "after"},
    act="quick_gelu",
    eps=1e-5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    processor="CLIP",
)
_SIGLIP = Kind(
    "hf-siglip",
    "map",
    _BICUBIC,
    act="gelu_pytorch_tanh",
    eps=1e-6,
    mean=HALF,
    std=HALF,
    processor="Siglip",
)
KINDS = {
    "vit": Kind("hf-vit", "cls", _BICUBIC, mean=HALF, std=HALF),
    "deit": Kind("hf-vit", "cls", _BICUBIC, processor="DeiT"),
    "vit_mae": Kind("hf-vit", "cls", _BICUBIC),
    "ijepa": Kind("hf-vit", "mean", _BICUBIC),
    "dinov2": _DINOV2,
    "dinov2_with_registers": Kind(
        "hf-dinov2", "cls+mean", {"pos_resize": "bicubic-antialias"}, eps=1e-6, processor="Bit"
    ),
    "dinov3_vit": Kind("hf-dinov3", "cls+mean", eps=1e-5, n_heads=6, processor="DINOv3ViT"),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}


def describe_huggingface(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    """Return the family's name and the options that its tensors do not show.

    Raises:
        ValueError: the kind of model or its activation is not covered.
    """
    name = config["model_type"]
    if name not in KINDS:
        raise ValueError(f"model_type {name!r} is not covered; there are {', '.join(KINDS)}")
    kind, family = KINDS[name], KINDS[name].family
    own = config if "hidden_size" in config else config.get("vision_config") or {}
    own = own if name in ("clip", "siglip") else config
    act = own.get("hidden_act", kind.act)
    gated_dinov3 = family == "hf-dinov3" and any(".gate_proj." in key for key in tensors)
    if gated_dinov3:  # hidden_act is its gate's; DINOv2's gate is always silu
        family = "hf-dinov3-gated"
    if act not in ACTS:
        raise ValueError(f"hidden_act {act!r} is not covered; there are {', '.join(ACTS)}")
    options: dict[str, Any] = {
        **kind.options,
        "pooling": kind.pooling,
        "gate" if gated_dinov3 else "act": ACTS[act],
        "eps": own.get("layer_norm_eps", kind.eps),
        "n_heads": own.get("num_attention_heads", kind.n_heads),
        "image_size": side_of(own.get("image_size", 224)),
    }
    if kind.family == "hf-dinov3":
        options["rope_theta"] = float(own.get("rope_theta", 100.0))
    return family, options | _as_classifier(family, tensors)


def _as_classifier(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options in which transformers' classes for image classification differ."""
    if any(key.startswith("cls_classifier.") for key in tensors):
        return {"pooling": "cls+dist"}
    if not any(key.startswith("classifier.") for key in tensors):
        return {}
    return {
        "hf-clip": {"pooling": "mean", "final_norm": "none"},
        "hf-siglip": {"pooling": "mean"},
    }.get(family, {})
