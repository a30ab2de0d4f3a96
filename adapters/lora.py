"""LoRA: a linear layer in, the layer plus a product of two thin matrices out (arXiv:2106.09685)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import AdapterConfig, AdapterLinear, plain_linear


class LoRALinear(AdapterLinear):
    """y = W x + b + scale B A dropout(x), from x (..., I) to y (..., O); B starts at zero."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, self.in_features))  # (R, I)
        self.lora_b = nn.Parameter(base.weight.new_zeros(self.out_features, rank))  # (O, R)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + self.update(self.dropout(x))

    def update(self, x: Tensor) -> Tensor:
        """Return scale B A x (..., O) for x (..., I)."""
        return self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def adapted_weight(self) -> Tensor:
        """Return W + scale B A (O, I), in float32 or wider."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, a, b = (t.to(dtype) for t in (self.weight, self.lora_a, self.lora_b))
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, b, a, alpha=self.scale)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """The options of LoRA.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo")
    rank: int = 8  # R, at most the smaller side of every adapted weight
    alpha: float = 16  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of A, in training only
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (arXiv:2312.03732)

    layer: ClassVar[type[LoRALinear]] = LoRALinear
    peft_marks = {"peft_type": "LORA", "use_dora": False}
    peft_options = AdapterConfig.peft_options | {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "use_rslora": "use_rslora",
    }
    peft_tensors = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    peft_ignored = AdapterConfig.peft_ignored | {
        "init_lora_weights",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} is not a positive integer; 4 to 32 are usual")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r} is not positive; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not in 0 <= dropout < 1; 0 is off")

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def adapt(self, module: nn.Module, name: str) -> LoRALinear:
        """Return the LoRA layer that takes the place of a plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`, or the rank exceeds its sides.
        """
        base = plain_linear(module, name)
        if self.rank > min(base.weight.shape):
            raise ValueError(
                f"rank={self.rank} exceeds the smaller side of {name!r}, "
                f"{tuple(base.weight.shape)}; choose rank from 1 to {min(base.weight.shape)}"
            )
        return self.layer(base, rank=self.rank, scale=self.scale, dropout=self.dropout)

    @classmethod
    def from_peft(cls, written: Mapping[str, Any]) -> Self:
        """Return the config that an adapter_config.json tells; keys left out have PEFT's defaults.

        Raises:
            ValueError: an option is missing, has a wrong value, or is not supported and not off.
        """
        init = written.get("init_lora_weights", True)
        if init not in (None, True, False, "gaussian", "orthogonal", "eva"):
            raise ValueError(
                f"option init_lora_weights={init!r} changes the base's weights; convert it with "
                "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
        return super().from_peft(defaults | dict(written))
