"""The methods by name; a new one is a new file and a line in `METHODS`."""

from adapters.config import AdapterConfig
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

METHODS: dict[str, type[AdapterConfig]] = {
    "lora": LoRAConfig,
    "dora": DoRAConfig,
    "vera": VeRAConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "ia3": IA3Config,
    "ssf": SSFConfig,
    "bitfit": BitFitConfig,
    "norm": NormConfig,
    "adaptformer": AdaptFormerConfig,
    "adapterplus": AdapterPlusConfig,
    "vpt": VPTConfig,
}
