"""A base converted from another library in, a folder that this library loads out.

A converted base records its source's config and the names, shapes and dtypes of its tensors, so the
way back is exact: tensors that did not train are bit for bit the source's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vitft.families.describe import class_names, names_in
from vitft.families.preparing import RESAMPLE
from vitft.families.rename import translate
from vitft.files import write_bytes, write_json
from vitft.model.vit import VisionTransformer
from vitft.pictures.preprocess import scaled_side

# model_type -> prefix of names in transformers' class for image classification, and its name
CLASSIFIERS = {
    "vit": ("vit.", "ViTForImageClassification"),
    "deit": ("deit.", "DeiTForImageClassification"),
    "ijepa": ("ijepa.", "IJepaForImageClassification"),
    "dinov2": ("dinov2.", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "dinov2_with_registers.",
        "Dinov2WithRegistersForImageClassification",
    ),
}

# transformers' classes of images and texts -> class and model_type of their vision tower alone
TOWERS = {
    "CLIPModel": ("CLIPVisionModelWithProjection", "clip_vision_model"),
    "SiglipModel": ("SiglipVisionModel", "siglip_vision_model"),
}

CROP_MODES = {"shortest": "center", "squash": "squash", "pad": "border"}  # timm's names


def write_source(model: VisionTransformer, folder: Path, library: str) -> None:
    """Write the model as a folder of the library that it was converted from.

    Args:
        model: a plain base, its adapter merged.
        folder: to write to.
        library: "hf" or "timm".

    Raises:
        ValueError: the base comes from elsewhere, or the library has no class for its head or no
            processor that prepares images as it does.
        OSError: the folder can't be written.
    """
    family, config = str(model.facts.get("family", "")), dict(model.facts.get("config") or {})
    if not family.startswith(library) or not config:
        raise ValueError(
            f"the base was not converted from a folder of {library}; export it as onnx instead"
        )
    tensors = their_tensors(model)
    if "head.weight" not in {name for key in tensors for name in translate(key, family)}:
        tensors, config = _with_head(model, tensors, config, library)
    if config.get("architectures") == ["ViTMAEForPreTraining"]:  # its decoder is not in our base
        config["architectures"] = ["ViTMAEModel"]
    config = _tower_alone(config)
    config |= {"hf": _hf_entries, "timm": _timm_entries}[library](model, config)
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"
    # the dtype that transformers computes in by default; version 4 has the second key
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    write_bytes(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    write_json(folder / "config.json", config)
    if library == "hf":  # timm's is in its config
        write_json(folder / "preprocessor_config.json", _processor(model))


def their_tensors(model: VisionTransformer) -> dict[str, Tensor]:
    """Return the tensors under the source's names, in its shapes, and in its dtypes where exact.

    Of tensors that our base lacks, mask tokens are zeros; poolers and decoders, which our outputs
    don't need, are left out.
    """
    family, ours = str(model.facts["family"]), model.state_dict() | _two_heads(model)
    if model.config.n_registers == 0:  # transformers has an empty tensor of none
        ours["registers"] = torch.empty(0)
    found: dict[str, Tensor] = {}
    for key, (dtype, *shape) in model.facts["layout"].items():
        names = translate(key, family)
        kind = getattr(torch, dtype)
        if names and all(name in ours for name in names):
            tensor = torch.cat([ours[name] for name in names])
            if not names[0].startswith("head"):  # which may have other classes now
                tensor = tensor.reshape(_shape(shape, tensor))
            exact = torch.equal(tensor.to(kind).to(tensor.dtype), tensor)
            found[key] = tensor.to(kind) if exact else tensor
        elif key.endswith("mask_token"):
            found[key] = torch.zeros(shape, dtype=kind)
    return {key: tensor.detach().contiguous().clone() for key, tensor in found.items()}


def _tower_alone(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config; for that of a model of images and texts, its vision tower's."""
    name = (config.get("architectures") or [""])[0]
    if name not in TOWERS:
        return config
    kind, model_type = TOWERS[name]
    outer: dict[str, Any] = {
        key: config[key] for key in ("dtype", "torch_dtype", "license") if key in config
    }
    if name == "CLIPModel":  # to which the tower's own entry means nothing
        outer["projection_dim"] = config.get("projection_dim", 512)
    vision = dict(config.get("vision_config") or {})
    return vision | outer | {"architectures": [kind], "model_type": model_type}


def _two_heads(model: VisionTransformer) -> dict[str, Tensor]:
    """Return heads of class and distillation token; the mean of their logits is the one head's."""
    if model.config.pooling != "cls+dist":
        return {}
    weights = (2 * model.head.weight).chunk(2, dim=1)
    found = dict(zip(("head.weight", "head_dist.weight"), weights, strict=True))
    if model.head.bias is not None:
        found |= {"head.bias": model.head.bias, "head_dist.bias": model.head.bias}
    return found


def _shape(shape: list[int], tensor: Tensor) -> list[int]:
    """Return the source's shape, with the number of positions that the tensor has now."""
    size = torch.Size(shape).numel()
    return shape if size == tensor.numel() else [*shape[:-2], tensor.shape[-2], shape[-1]]


def _with_head(
    model: VisionTransformer, tensors: dict[str, Tensor], config: dict[str, Any], library: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config with the head that the source did not have."""
    if not model.has_head:
        return tensors, config
    head = {name: t.detach().clone() for name, t in model.head.state_dict().items()}
    if library == "timm":
        return tensors | {f"head.{name}": tensor for name, tensor in head.items()}, config
    kind = str(config["model_type"])
    if kind == "vit_mae":  # a plain ViT after pretraining
        kind, config = "vit", config | {"model_type": "vit"}
        tensors = {key: t for key, t in tensors.items() if "mask_token" not in key}
    if kind not in CLASSIFIERS:
        raise ValueError(
            f"transformers has no class for images' classes on {kind!r} that computes this; "
            "export it as onnx instead"
        )
    prefix, name = CLASSIFIERS[kind]
    renamed = {f"{prefix}{key.removeprefix(prefix)}": t for key, t in tensors.items()}
    renamed |= {f"classifier.{key}": t for key, t in head.items()}
    return renamed, config | {"architectures": [name]}


def _hf_entries(model: VisionTransformer, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config's entries of classes and image size, for transformers."""
    names = {str(i): name for i, name in enumerate(_class_names(model, config))}
    size = {} if "vision_config" in config else {"image_size": model.config.image_size}
    return size | {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def _class_names(model: VisionTransformer, config: Mapping[str, Any]) -> Sequence[str]:
    """Return the class names; where they are the source's, as it has them, with repeated names."""
    if not model.has_head:
        return ()
    is_theirs = class_names(config, len(model.classes)) == model.classes
    return names_in(config) if is_theirs else model.classes


def _timm_entries(model: VisionTransformer, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config's entries of classes and preprocessing, for timm."""
    size, n = model.config.image_size, model.head.out_features if model.has_head else 0
    pooling = {key: config[key] for key in ("global_pool",) if config.get(key)}
    pretrained = dict(config.get("pretrained_cfg") or {})
    pretrained.pop("test_input_size", None)
    return {
        "num_classes": n,
        "label_names": [*_class_names(model, config)],
        "model_args": pooling | dict(config.get("model_args") or {}) | {"img_size": size},
        "pretrained_cfg": pretrained
        | {
            "input_size": [model.config.n_channels, size, size],
            "mean": [*model.mean],
            "std": [*model.std],
            "crop_pct": model.framing.crop,
            "crop_mode": CROP_MODES[model.framing.resize],
            "interpolation": model.framing.kernel.removeprefix("draft-"),
            "num_classes": n,
        },
    }


def _processor(model: VisionTransformer) -> dict[str, Any]:
    """Return the entries of a preprocessor_config.json that prepares images as we do.

    Raises:
        ValueError: transformers has no processor that pads.
    """
    framing, whole = model.framing, scaled_side(model.image_size, model.framing.crop)
    if framing.resize == "pad":
        raise ValueError("transformers has no image processor that pads; use another --resize")
    squash = framing.resize == "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": whole, "width": whole} if squash else {"shortest_edge": whole},
        "do_center_crop": True,
        "crop_size": {"height": model.image_size, "width": model.image_size},
        "resample": RESAMPLE.index(framing.kernel.removeprefix("draft-")),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*model.mean],
        "image_std": [*model.std],
    }
