"""A Vision Transformer whose named linears take adapters: model, data, training and command line.

A name is imported when it is first used, so that `vitft --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitft.version import __version__

if TYPE_CHECKING:
    from recipes.finetune import finetune
    from recipes.shared.classifier import Classifier
    from vitft.model.checkpoint import load_model, save_model
    from vitft.model.config import ViTConfig
    from vitft.model.vit import VisionTransformer

__all__ = [
    "Classifier",
    "VisionTransformer",
    "ViTConfig",
    "__version__",
    "finetune",
    "load_model",
    "save_model",
]

_MODULES = {
    "Classifier": "recipes.shared.classifier",
    "finetune": "recipes.finetune",
    "VisionTransformer": "vitft.model.vit",
    "ViTConfig": "vitft.model.config",
    "load_model": "vitft.model.checkpoint",
    "save_model": "vitft.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitft' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
