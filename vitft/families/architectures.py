"""The name of a timm architecture in; the options that its tensors do not show out.

In timm, number of heads, eps and activation are in the code of the named function. Tests compare
every covered name with timm's own model.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitft.families.records import side_of

# parts of the names of architectures that are no plain ViT, or not covered yet
NOT_COVERED = re.compile(
    r"swin|eva02|beit|convnext|resnet|mvit|maxvit|hiera|aimv2|vit_pe_|_pe_|naflex|rope|gap_|"
    r"_rpn|relpos|srelpos|xcit|cait|davit|efficient|hybrid|_r\d+_|_r_|qk_norm|_parallel|_ci_|"
    r"lingbot|sapiens|_\d+x2_|_xp_"
)
# names of architectures with the tanh approximation of gelu
TANH = re.compile(r"(patch32|so400m_patch16|giantopt\w*)_siglip|large_patch16_siglip\w*_512")
# width -> number of heads; DINOv3 and SigLIP's giant differ
HEADS = {width: width // 64 for width in (192, 256, 384, 512, 640, 768, 896, 1024, 1536)}
HEADS |= {1152: 16, 1280: 16, 1408: 16, 1664: 16}
HEADS_DINOV3 = HEADS | {1280: 20, 4096: 32}
HEADS_GIANTOPT = {1536: 16}
POOLING = {"token": "cls", "avg": "mean", "map": "map"}
# arguments of a model that are read here, that its tensors show, or that matter only in training
COVERED_ARGUMENTS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "init_values", "class_token", "no_embed_class"),
    *("reg_tokens", "num_reg_tokens", "pre_norm", "fc_norm", "dynamic_img_size", "weight_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "strict_img_size", "fix_init"),
}


ON_IN_DINOV3 = ("use_rot_pos_emb", "rope_rotate_half")  # so that to be false is no default


def describe_architecture(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    """Return the family's name and the options of a timm architecture.

    Args:
        name: such as "vit_small_patch16_224.augreg_in1k", with or without the weights' tag.
        config: the hub's config.json.
        tensors: by timm's names.

    Raises:
        ValueError: the architecture, its pooling or an argument is not covered.
    """
    name = name.partition(".")[0]
    plain = re.match(r"(vit|deit3?|flexivit)_", name) and "patch_embed.proj.weight" in tensors
    if NOT_COVERED.search(name) or not plain:
        raise ValueError(f"architecture {name!r} is not covered; plain ViTs are")
    arguments = config.get("model_args") or {}
    unknown = arguments.keys() - COVERED_ARGUMENTS
    if unknown := {key for key in unknown if arguments[key] or key in ON_IN_DINOV3}:
        raise ValueError(f"model_args {min(unknown)}={arguments[min(unknown)]!r} is not covered")
    dinov3, giantopt = "dinov3" in name, "giantopt" in name
    heads = HEADS_DINOV3 if dinov3 else HEADS_GIANTOPT if giantopt else HEADS
    of_pictures = side_of([*_pretrained(config).get("input_size", [3, 224, 224])[1:]])
    options: dict[str, Any] = {
        "eps": 1e-5 if "_clip_" in name or dinov3 else 1e-6,
        "act": _act(name),
        "image_size": side_of(arguments.get("img_size") or of_pictures),
        "n_heads": arguments.get("num_heads")
        or heads_of(tensors["patch_embed.proj.weight"], heads),
        "pooling": _pooling(config, tensors, "avg" if dinov3 else "token"),
    }
    if "fc_norm.weight" in tensors:
        options["final_norm"] = "after"
    if "head_dist.weight" in tensors:
        options["pooling"] = "cls+dist"
    if dinov3:
        return "timm-dinov3", options | {"rope_theta": 100.0}
    return ("timm-gated" if is_gated(tensors) else "timm"), options


def heads_of(patch: Tensor, heads: Mapping[int, int]) -> int:
    """Return the number of heads of a ViT by its width.

    Args:
        patch: weight of the patch embedding (D, C, p, p).
        heads: width D -> number of heads.

    Raises:
        ValueError: no known ViT has this width.
    """
    width = len(patch) if patch.ndim else 0
    if width not in heads:
        raise ValueError(
            f"how many heads a ViT of width {width} has is not known, and no config.json tells it; "
            "convert a folder whose config.json does"
        )
    return heads[width]


def is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether timm's fc1 holds gate and value, with twice as many rows as fc2 columns."""
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if up is None or down is None or (up.ndim, down.ndim) != (2, 2):
        return False
    return up.shape[0] == 2 * down.shape[1]


def _act(name: str) -> str:
    if "quickgelu" in name:
        return "quick_gelu"
    return "gelu_tanh" if TANH.search(name) else "gelu"


def _pooling(config: Mapping[str, Any], tensors: Mapping[str, Tensor], default: str) -> str:
    """Return our name of the pooling in a config, else of that which the tensors show.

    Raises:
        ValueError: it is not covered.
    """
    default = "map" if "attn_pool.latent" in tensors else default
    arguments = config.get("model_args") or {}
    given = arguments.get("global_pool", config.get("global_pool", default))
    if given not in POOLING:
        raise ValueError(f"global_pool {given!r} is not covered; there are {', '.join(POOLING)}")
    return POOLING[given]


def _pretrained(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("pretrained_cfg") or {}
