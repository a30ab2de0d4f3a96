"""Another library's ViT in; a `VisionTransformer` out that computes the same up to rounding.

Most of the config follows from the tensors: widths, biases, tokens, norms. The rest is from
`describe`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitft.families.describe import class_names, describe, facts
from vitft.families.names import FAMILIES
from vitft.families.preparing import preparation, prepared_side
from vitft.families.rename import rename
from vitft.families.source import read_source
from vitft.files import check_weight
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer


def read_foreign(path: str | Path) -> VisionTransformer:
    """Return the ViT in a folder or file of another library, in float32 and ready for evaluation.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a family, option or tensor is not covered; the message names it.
    """
    source = read_source(Path(path))
    try:
        family, options = describe(source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        tensors = rename(source.tensors, FAMILIES[family])
        if family == "clip" and "head.weight" in tensors:
            tensors["head.weight"] = tensors["head.weight"].T  # it multiplies from the right
        model = build(tensors, options, inverse=family.startswith("hf-"))
    except ValueError as error:
        raise ValueError(f"{path} ({family}): {error}") from error
    try:
        model.classes = class_names(source.config, model.head.out_features) or model.classes
    except ValueError as error:
        raise ValueError(f"{path} ({family}): {error}") from error
    try:
        model.preprocessing = preparation(source, family, model.image_size, model.config.n_channels)
        side = prepared_side(source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend that entry of its config to load it") from error
    model.facts = facts(source, family)
    if side not in (None, model.image_size):
        model.facts["prepared_size"] = side
    return model.requires_grad_().eval()


def build(
    tensors: dict[str, Tensor], options: Mapping[str, Any], *, inverse: bool = False
) -> VisionTransformer:
    """Return the model of these tensors, under our names, in float32.

    Args:
        tensors: by our names.
        options: those that the tensors do not show.
        inverse: rotary periods are rounded as Hugging Face's are, by 1 / period.

    Raises:
        ValueError: a tensor is missing, left over or of a wrong shape.
    """
    tensors = {name: t.float() for name, t in tensors.items() if name != "rope.periods"} | {
        name: t.double() for name, t in tensors.items() if name == "rope.periods"
    }
    if options["pooling"] == "cls+dist":
        _join_heads(tensors)
    config = infer(tensors, options)
    # the source has a pooling head or a last norm that its task does not use, or no registers
    unused = ["map_pool."] * (config.pooling != "map") + ["norm."] * (config.final_norm == "none")
    unused += ["registers"] * (config.n_registers == 0)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(tuple(unused))}
    with torch.device("meta"):
        model = VisionTransformer(config)
    expected = model.state_dict()
    _complete(tensors, expected, config, inverse=inverse)
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or name not in expected:
            raise ValueError(f"tensor {name} is {'missing' if name in expected else 'left over'}")
        if tensors[name].numel() != expected[name].numel():
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"tensor {name} has shape {shapes}")
        check_weight(name, tensors[name])
        tensors[name] = tensors[name].reshape(expected[name].shape).contiguous().clone()
    model.load_state_dict(tensors, assign=True)
    return model


def infer(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> ViTConfig:
    """Return the config of tensors under our names, with the options that they do not show.

    Raises:
        ValueError: a tensor that the config needs is missing or of a wrong shape.
    """
    for name in ("patch_embed.weight", "blocks.0.ffn.w1.weight"):
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
    patch = tensors["patch_embed.weight"]  # (D, C, p, p)
    if patch.ndim != 4:
        raise ValueError(f"patch_embed.weight has shape {tuple(patch.shape)}, not (D, C, p, p)")
    dim, n_channels, patch_size, _ = patch.shape
    for name in ("pos_embedding", "registers"):
        if name in tensors and tensors[name].ndim < 2:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not (1, n, D)")
    special = sum(name in tensors for name in ("cls_token", "dist_token"))
    registers = tensors.get("registers")
    given = {key: value for key, value in options.items() if value is not None}
    values: dict[str, Any] = {
        "dim": dim,
        "hidden_dim": len(tensors["blocks.0.ffn.w1.weight"]),
        "n_layers": 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        "patch_size": patch_size,
        "n_channels": n_channels,
        "n_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 1,
        "dropout": 0.0,
        "image_size": 224,
        "qkv_bias": "blocks.0.attn.wq.bias" in tensors,
        "proj_bias": "blocks.0.attn.wo.bias" in tensors,
        "patch_bias": "patch_embed.bias" in tensors,
        "head_bias": "head.weight" not in tensors or "head.bias" in tensors,
        "gated": "blocks.0.ffn.w3.weight" in tensors,
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "class_token": "cls_token" in tensors,
        "dist_token": "dist_token" in tensors,
        "n_registers": registers.shape[-2] if registers is not None else 0,
        "pos": "learned" if "pos_embedding" in tensors else "none",
        "pre_norm": "pre_norm.weight" in tensors,
    }
    if "pos_embedding" in tensors:
        n = tensors["pos_embedding"].shape[-2]
        n_given = (given.pop("image_size", 0) // patch_size) ** 2
        with_registers = special + values["n_registers"]  # they rarely have positions
        prefixes = [*range(special, -1, -1), with_registers]
        if n == n_given + with_registers:
            prefixes = [with_registers]
        values["n_pos_prefix"] = next((k for k in prefixes if _is_square(n - k)), 0)
        values["image_size"] = math.isqrt(n - values["n_pos_prefix"]) * patch_size
    if given["pooling"] == "map" and "map_pool.query" not in tensors:
        given["pooling"] = "mean"
    return ViTConfig(**{**values, **given})


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def _periods(theta: float, n: int, *, inverse: bool) -> Tensor:
    """Return rotary periods (n,) in float64, rounded to float32 as the source's library does.

    Args:
        theta: their base.
        n: how many.
        inverse: the library rounds 1 / period, as Hugging Face's does.
    """
    periods = theta ** (torch.arange(n, dtype=torch.float32) / n)
    return 1 / (1 / periods).double() if inverse else periods.double()


def _complete(
    tensors: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    config: ViTConfig,
    *,
    inverse: bool,
) -> None:
    """Add tensors that a source may lack: zero biases of keys, a head of zeros, rotary periods."""
    for name, empty in expected.items():
        if name in tensors:
            continue
        if name.endswith("attn.wk.bias") or name.startswith("head."):
            tensors[name] = torch.zeros(empty.shape)
        elif name == "rope.periods":
            tensors[name] = _periods(config.rope_theta, len(empty), inverse=inverse)


def _join_heads(tensors: dict[str, Tensor]) -> None:
    """Join the heads of class and distillation token, whose logits are averaged, into one.

    Raises:
        ValueError: they do not fit each other.
    """
    for kind, n_axes in (("weight", 2), ("bias", 1)):
        pair = [tensors.pop(f"{name}.{kind}", torch.empty(0)) for name in ("head", "head_dist")]
        if pair[0].shape != pair[1].shape or pair[0].ndim != n_axes:
            shapes = " and ".join(str(tuple(one.shape)) for one in pair)
            raise ValueError(f"the {kind}s of its two heads do not fit each other: {shapes}")
        joined = torch.cat(pair, 1) if kind == "weight" else pair[0] + pair[1]
        tensors[f"head.{kind}"] = joined / 2
