"""Adapters for any module that calls its submodules: inject, train, save, load, merge, eject."""

from adapters.changes import differences, effective_rank, updates
from adapters.check import check
from adapters.config import AdapterConfig
from adapters.identity import fingerprint, shared_copy
from adapters.inject import inject
from adapters.io import load_adapter, save_adapter
from adapters.many.arithmetic import combine
from adapters.many.bank import Bank
from adapters.many.difference import diff
from adapters.many.together import together
from adapters.methods import METHODS
from adapters.methods.adapterplus import AdapterPlusConfig
from adapters.methods.adaptformer import AdaptFormerConfig
from adapters.methods.bitfit import BitFitConfig
from adapters.methods.dora import DoRAConfig
from adapters.methods.ia3 import IA3Config
from adapters.methods.loha import LoHaConfig
from adapters.methods.lokr import LoKrConfig
from adapters.methods.lora import LoRAConfig
from adapters.methods.norm import NormConfig
from adapters.methods.ssf import SSFConfig
from adapters.methods.vera import VeRAConfig
from adapters.methods.vpt import VPTConfig
from adapters.restore import disabled, eject, merge, mergeable

__all__ = [
    "METHODS",
    "AdaptFormerConfig",
    "AdapterConfig",
    "AdapterPlusConfig",
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
    "check",
    "combine",
    "diff",
    "differences",
    "disabled",
    "effective_rank",
    "eject",
    "fingerprint",
    "inject",
    "load_adapter",
    "merge",
    "mergeable",
    "save_adapter",
    "shared_copy",
    "together",
    "updates",
]
