"""What a source says of itself in; its family and what its tensors do not tell out.

That is heads, eps, activation, pooling, positions at another size: from config.json, from the name
of a timm architecture, or from the names of an original file's tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitft.families.names import FAMILIES
from vitft.families.source import Source

# model_type in a Hugging Face config.json -> the family, and what its tensors do not tell
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("hf-vit", {"pooling": "cls", "pos_resize": "bicubic"}),
    "deit": ("hf-vit", {"pooling": "cls", "pos_resize": "bicubic"}),
    "vit_mae": ("hf-vit", {"pooling": "cls", "pos_resize": "bicubic"}),
    "ijepa": ("hf-vit", {"pooling": "mean", "pos_resize": "bicubic"}),
    "dinov2": ("hf-dinov2", {"pooling": "cls+mean", "pos_resize": "bicubic"}),
    "dinov2_with_registers": (
        "hf-dinov2",
        {"pooling": "cls+mean", "pos_resize": "bicubic-antialias"},
    ),
    "dinov3_vit": ("hf-dinov3", {"pooling": "cls+mean", "rope_theta": 100.0}),
    "clip": ("hf-clip", {"pooling": "cls", "pos_resize": "bicubic", "final_norm": "after"}),
    "clip_vision_model": (
        "hf-clip",
        {"pooling": "cls", "pos_resize": "bicubic", "final_norm": "after"},
    ),
    "siglip": ("hf-siglip", {"pooling": "map", "pos_resize": "bicubic"}),
    "siglip_vision_model": ("hf-siglip", {"pooling": "map", "pos_resize": "bicubic"}),
}
HF_ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# widths whose heads are not 64 wide -> heads, in timm and in original files
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# kinds of timm's architectures that are no plain ViT, or not read yet
NOT_COVERED = re.compile(
    r"swin|eva02|beit|convnext|resnet|mvit|maxvit|hiera|aimv2|vit_pe_|_pe_|naflex|rope|gap_|"
    r"_rpn|relpos|srelpos|xcit|cait|davit|efficient|hybrid|_r\d+_|_r_|qk_norm|_parallel|_ci_"
)
TANH = re.compile(r"(patch32|so400m_patch16|giantopt\w*)_siglip|large_patch16_siglip\w*_512")


def describe(source: Source) -> tuple[str, dict[str, Any]]:
    """Return the family's name and the options that its tensors do not tell.

    Raises:
        ValueError: the family is not covered.
    """
    config = source.config
    if kind := config.get("model_type"):
        return _describe_hf(kind, config, source.tensors)
    if architecture := config.get("architecture"):
        return _describe_timm(architecture, config, source.tensors)
    return _describe_by_names(source.tensors)


def _describe_hf(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    if kind not in HF:
        raise ValueError(f"model_type {kind!r} is not covered; there are {', '.join(HF)}")
    family, options = HF[kind][0], dict(HF[kind][1])
    own = config.get("vision_config") or config
    act = own.get("hidden_act", "quick_gelu" if kind.startswith("clip") else "gelu")
    if own.get("use_gated_mlp") and kind == "dinov3_vit":
        family, act = "hf-dinov3-gated", "gelu"
    if act not in HF_ACTS:
        raise ValueError(f"hidden_act {act!r} is not covered; there are {', '.join(HF_ACTS)}")
    eps = {
        "dinov2": 1e-6,
        "dinov2_with_registers": 1e-6,
        "siglip": 1e-6,
        "siglip_vision_model": 1e-6,
    }
    default = eps.get(kind, 1e-5 if kind.startswith(("clip", "dinov3")) else 1e-12)
    options |= {
        "act": HF_ACTS[act],
        "eps": own.get("layer_norm_eps", default),
        "n_heads": own.get("num_attention_heads", 12),
        "image_size": own.get("image_size", 224),
    }
    if "rope_theta" in options:
        options["rope_theta"] = float(own.get("rope_theta", 100.0))
    heads = any(key.startswith("classifier.") for key in tensors)
    if any(key.startswith("cls_classifier.") for key in tensors):
        options["pooling"] = "cls+dist"
    elif heads and kind.startswith("clip"):
        options |= {"pooling": "mean", "final_norm": "none"}
    elif heads and kind.startswith("siglip"):
        options["pooling"] = "mean"
    return family, options


def _describe_timm(
    architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    if NOT_COVERED.search(architecture) or not re.match(r"(vit|deit3?|flexivit)_", architecture):
        raise ValueError(f"architecture {architecture!r} is not covered; plain ViTs are")
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    clip, dinov3 = "_clip_" in architecture, "dinov3" in architecture
    options: dict[str, Any] = {
        "eps": 1e-5 if clip or dinov3 else 1e-6,
        "act": "quick_gelu"
        if "quickgelu" in architecture
        else "gelu_tanh"
        if TANH.search(architecture)
        else "gelu",
        "image_size": arguments.get("img_size") or pretrained.get("input_size", [3, 224, 224])[1],
        "n_heads": arguments.get("num_heads"),
    }
    pool = config.get("global_pool") or ("avg" if dinov3 else "token")
    options["pooling"] = {"token": "cls", "avg": "mean", "map": "map"}.get(pool, pool)
    if any(key.startswith("fc_norm.") for key in tensors):
        options["final_norm"] = "after"
    if "head_dist.weight" in tensors:
        options["pooling"] = "cls+dist"
    if dinov3:
        return "timm-dinov3", options | {"rope_theta": 100.0}
    gated = "blocks.0.mlp.fc1.weight" in tensors and _is_gated(tensors)
    return ("timm-gated" if gated else "timm"), options


def _is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether timm's fc1 holds gate and value: it is twice as high as fc2 is wide."""
    up, down = tensors["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc2.weight"]
    return up.shape[0] == 2 * down.shape[1]


def _describe_by_names(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return family and options of an original file, which has no config, by its tensors' names."""
    if "visual.class_embedding" in tensors:
        act = "quick_gelu" if "visual.proj" in tensors and "logit_scale" in tensors else "gelu"
        return "clip", {"pooling": "cls", "final_norm": "after", "act": act}
    if "storage_tokens" in tensors or "rope_embed.periods" in tensors:
        return "dinov3", {"pooling": "cls+mean", "rope_theta": 100.0}
    if "mask_token" in tensors and "pos_embed" in tensors and "blocks.0.ls1.gamma" in tensors:
        registers = "register_tokens" in tensors
        resize = "bicubic-antialias" if registers else "bicubic"
        offset = 0.0 if registers else 0.1
        return "dinov2", {
            "pooling": "cls+mean",
            "eps": 1e-6,
            "pos_resize": resize,
            "pos_offset": offset,
        }
    if "blocks.0.attn.qkv.weight" in tensors and "pos_embed" in tensors:  # DINO, MAE, DeiT
        return "timm", {"pooling": "cls", "eps": 1e-6}
    raise ValueError(
        "its tensors are of no family that is known without a config.json; "
        f"there are {', '.join(FAMILIES)}"
    )


def class_names(source: Source, n_classes: int) -> tuple[str, ...]:
    """Return the class names that the source tells, () where it has none for this head."""
    config = source.config
    labels = config.get("id2label") or {}
    names = [labels[key] for key in sorted(labels, key=int)]
    names = (
        names or config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    )
    return tuple(map(str, names)) if names and len(names) == n_classes else ()


def statistics(source: Source, n_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, for pixels in 0..1."""
    processor, pretrained = source.preprocessing, source.config.get("pretrained_cfg") or {}
    mean = processor.get("image_mean") or pretrained.get("mean") or (0.485, 0.456, 0.406)
    std = processor.get("image_std") or pretrained.get("std") or (0.229, 0.224, 0.225)
    if len(mean) != n_channels:
        mean, std = (0.5,) * n_channels, (0.5,) * n_channels
    return tuple(map(float, mean)), tuple(map(float, std))


def facts(source: Source, family: str) -> dict[str, Any]:
    """Return what a converted file tells of its source."""
    processor, pretrained = source.preprocessing, source.config.get("pretrained_cfg") or {}
    found = {
        "source": source.name,
        "family": family,
        "architecture": source.config.get("architecture"),
        "licence": pretrained.get("license") or source.config.get("license"),
        "checksum": source.checksum,
        "config": source.config or None,
        "layout": {k: [str(t.dtype)[6:], *t.shape] for k, t in source.tensors.items()},
        "size": processor.get("size") or pretrained.get("input_size"),
        "crop": processor.get("crop_size") or pretrained.get("crop_pct"),
        "kernel": processor.get("resample") or pretrained.get("interpolation"),
    }
    return {key: value for key, value in found.items() if value is not None}
