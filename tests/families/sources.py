"""Small models of other libraries, with random weights, and the folders that hold them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitft.data.named import import_torchvision

import_torchvision()  # before timm and transformers do

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MLP = SMALL | {"intermediate_size": 48}
# name -> (class in transformers, class of its config, arguments)
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", MLP),
    "vit of classes": ("ViTForImageClassification", "ViTConfig", MLP | {"num_labels": 3}),
    "deit": ("DeiTModel", "DeiTConfig", MLP),
    "deit of classes": (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        MLP | {"num_labels": 3},
    ),
    "ijepa": ("IJepaModel", "IJepaConfig", MLP),
    "mae": ("ViTMAEModel", "ViTMAEConfig", MLP | {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL),
    "dinov2 of classes": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        SMALL | {"num_labels": 3},
    ),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", SMALL | {"use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SMALL),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", MLP | {"num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        MLP | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", MLP),
    "clip projected": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        MLP | {"projection_dim": 5},
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", MLP),
}
# name -> (architecture in timm, arguments)
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", {}),
    "vit mean": ("vit_small_patch16_224", {"global_pool": "avg"}),
    "deit distilled": ("deit_small_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "flexivit": ("flexivit_small", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "siglip tanh": ("vit_so400m_patch16_siglip_256", {"num_classes": 0}),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {"num_classes": 0}),
    "map registers": ("vit_so150m_patch16_reg4_map_256", {}),
    "register positions": ("vit_small_patch16_224", {"reg_tokens": 4}),
    "map class token": ("vit_small_patch16_224", {"global_pool": "map"}),
    "dinov3": ("vit_small_patch16_dinov3", {"num_classes": 0}),
    "dinov3 biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3", {"num_classes": 0}),
}


def shaken(model: nn.Module) -> nn.Module:
    """Return the model with every parameter random, ready for evaluation."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hf_model(name: str, folder: Path, **changes: Any) -> nn.Module:
    """Return a model of transformers, saved to the folder."""
    import transformers

    kind, config, arguments = HF[name]
    made = getattr(transformers, config)(**arguments | changes)
    model = shaken(getattr(transformers, kind)(made))
    model.save_pretrained(folder)
    return model


def timm_model(name: str, folder: Path, **changes: Any) -> nn.Module:
    """Return a model of timm, saved to the folder as the hub's are; `changes` are of its sizes."""
    import timm

    architecture, arguments = TIMM[name]
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
    sizes |= {"num_heads": 2} | changes
    model = shaken(timm.create_model(architecture, **sizes, **{"num_classes": 3} | arguments))
    config = {
        "architecture": architecture,
        "global_pool": model.global_pool,
        "model_args": sizes | {k: v for k, v in arguments.items() if k == "reg_tokens"},
        "pretrained_cfg": {"license": "apache-2.0", "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save(model.state_dict(), folder / "model.safetensors")
    return model


def save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
