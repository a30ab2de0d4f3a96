"""Tensors of a file from a model's authors in; its family, and options that they do not show, out.

DINOv2, DINOv3, DINO, MAE and DeiT come without a config, open_clip's vision towers with an
open_clip_config.json.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitft.families.architectures import HEADS, HEADS_DINOV3, heads_of
from vitft.families.names import FAMILIES

OPENAI = "input_resolution"  # a tensor that only OpenAI's own files hold
# entries of open_clip's vision_cfg that are read here, that tensors show, or that matter only in
# training
COVERED_ENTRIES = {
    *("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"),
    *("output_tokens", "no_ln_pre", "pool_type", "final_ln_after_pool", "act_kwargs"),
    *("norm_kwargs", "pos_embed_type"),
}


def describe_original(
    tensors: Mapping[str, Tensor], clip: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the family's name and the options that the tensors do not show.

    Args:
        tensors: by their names in the file.
        clip: open_clip_config.json, {} where there is none.

    Raises:
        ValueError: the family, or an option of it, is not covered or not known.
    """
    if "visual.class_embedding" in tensors:
        return "clip", _describe_clip(tensors, clip)
    if any(key.startswith("visual.") for key in tensors):
        name = (
            clip.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", "another kind")
        )
        raise ValueError(f"an open_clip vision tower of {name} is not covered; plain ViTs are")
    patch = tensors.get("patch_embed.proj.weight")
    if patch is not None and ("storage_tokens" in tensors or "rope_embed.periods" in tensors):
        periods = tensors.get("rope_embed.periods")  # as many as a quarter of a head's width
        if periods is not None and not (patch.ndim and periods.ndim and len(periods)):
            raise ValueError("rope_embed.periods has no numbers")
        n_heads = (
            heads_of(patch, HEADS_DINOV3) if periods is None else len(patch) // 4 // len(periods)
        )
        return "dinov3", {"pooling": "cls+mean", "n_heads": n_heads, "rope_theta": 100.0}
    if patch is not None and "pos_embed" in tensors and _is_dinov2(tensors):
        registers = "register_tokens" in tensors
        return "dinov2", {
            "pooling": "cls+mean",
            "eps": 1e-6,
            "n_heads": heads_of(patch, HEADS),
            "pos_resize": "bicubic-antialias" if registers else "bicubic",
            "pos_offset": 0.0 if registers else 0.1,
        }
    if patch is not None and _is_plain(tensors):  # DINO, MAE, DeiT
        mean = "fc_norm.weight" in tensors  # as MAE's fine-tuned files
        options = {"pooling": "mean", "final_norm": "after"} if mean else {"pooling": "cls"}
        if "head_dist.weight" in tensors:
            options = {"pooling": "cls+dist"}
        return "timm", options | {"eps": 1e-6, "n_heads": heads_of(patch, HEADS)}
    raise ValueError(
        "its tensors are of no family that is known without a config.json; "
        f"there are {', '.join(FAMILIES)}"
    )


def _is_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of Meta's DINOv2, with blocks in chunks or not."""
    return "mask_token" in tensors and any(key.endswith(".ls1.gamma") for key in tensors)


def _is_plain(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether this is a plain ViT, of which only the number of heads is unknown."""
    others = ("norm_pre.weight", "attn_pool.latent", "blocks.0.ls1.gamma", "reg_token")
    known = {"blocks.0.attn.qkv.weight", "pos_embed", "cls_token"} <= tensors.keys()
    return known and not any(name in tensors for name in others)


def _describe_clip(tensors: Mapping[str, Tensor], clip: Mapping[str, Any]) -> dict[str, Any]:
    conv = tensors.get("visual.conv1.weight")
    if conv is None or not conv.ndim:
        raise ValueError("visual.conv1.weight is missing, or no tensor of weights")
    width = len(conv)
    options: dict[str, Any] = {"pooling": "cls", "final_norm": "after", "eps": 1e-5}
    if OPENAI in tensors:
        return options | {"act": "quick_gelu", "n_heads": width // 64}
    model = clip.get("model_cfg")
    if not model:
        raise ValueError(
            "an open_clip file tells neither its activation nor its heads; convert its folder, "
            "with open_clip_config.json"
        )
    vision = dict(model.get("vision_cfg") or {})
    if unknown := sorted(key for key in vision.keys() - COVERED_ENTRIES if vision[key]):
        raise ValueError(f"vision_cfg {unknown[0]}={vision[unknown[0]]!r} is not covered")
    pool, act_options = vision.get("pool_type", "tok"), vision.get("act_kwargs") or {}
    if pool not in ("tok", "avg"):
        raise ValueError(f"pool_type {pool!r} is not covered; there are tok, avg")
    act = "gelu_tanh" if act_options.get("approximate") == "tanh" else "gelu"
    after = pool == "tok" or vision.get("final_ln_after_pool", False)
    return {
        "pooling": {"tok": "cls", "avg": "mean"}[pool],
        "final_norm": "after" if after else "before",
        "eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        "act": "quick_gelu" if model.get("quick_gelu") else act,
        "n_heads": width // vision.get("head_width", 64),
    }
