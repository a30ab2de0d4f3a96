"""Adapters for any module that calls its parts: inject, train, save, load, merge, eject."""

from adapters.adaptformer import AdaptFormerConfig
from adapters.arithmetic import combine, diff
from adapters.bank import Bank
from adapters.base import AdapterConfig
from adapters.bitfit import BitFitConfig
from adapters.dora import DoRAConfig
from adapters.ia3 import IA3Config
from adapters.inject import disabled, eject, fingerprint, inject, merge, shared_copy
from adapters.io import load_adapter, save_adapter
from adapters.loha import LoHaConfig
from adapters.lokr import LoKrConfig
from adapters.lora import LoRAConfig
from adapters.methods import METHODS
from adapters.norm import NormConfig
from adapters.ssf import SSFConfig
from adapters.together import together
from adapters.vera import VeRAConfig
from adapters.vpt import VPTConfig

__all__ = [
    "METHODS",
    "AdaptFormerConfig",
    "AdapterConfig",
    "Bank",
    "BitFitConfig",
    "DoRAConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "NormConfig",
    "SSFConfig",
    "VPTConfig",
    "VeRAConfig",
    "combine",
    "diff",
    "disabled",
    "eject",
    "fingerprint",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "shared_copy",
    "together",
]
