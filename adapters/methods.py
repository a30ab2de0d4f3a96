"""The methods by name; a new one is a new file and a line in `METHODS`."""

from adapters.base import AdapterConfig
from adapters.dora import DoRAConfig
from adapters.lora import LoRAConfig

METHODS: dict[str, type[AdapterConfig]] = {
    "lora": LoRAConfig,
    "dora": DoRAConfig,
}
