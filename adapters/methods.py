"""The methods by name; a new one is a new file and a line in `METHODS`."""

from adapters.adaptformer import AdaptFormerConfig
from adapters.base import AdapterConfig
from adapters.bitfit import BitFitConfig
from adapters.dora import DoRAConfig
from adapters.ia3 import IA3Config
from adapters.loha import LoHaConfig
from adapters.lokr import LoKrConfig
from adapters.lora import LoRAConfig
from adapters.norm import NormConfig
from adapters.ssf import SSFConfig
from adapters.vera import VeRAConfig
from adapters.vpt import VPTConfig

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
    "vpt": VPTConfig,
}
