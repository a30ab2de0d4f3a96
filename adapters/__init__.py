"""Adapters for any module that calls its `nn.Linear`s: inject, train, save, load, merge, eject."""

from adapters.dora import DoRAConfig
from adapters.inject import disabled, eject, fingerprint, inject, merge
from adapters.io import load_adapter, save_adapter
from adapters.lora import LoRAConfig
from adapters.methods import METHODS

__all__ = [
    "METHODS",
    "DoRAConfig",
    "LoRAConfig",
    "disabled",
    "eject",
    "fingerprint",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
]
