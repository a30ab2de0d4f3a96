"""LoRA: a linear layer in, the layer plus a product of two thin matrices out (arXiv:2106.09685)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import AdapterConfig, AdapterLinear, plain_linear


class SummedProduct(torch.autograd.Function):
    """y = (W + scale B A) x + b with one product forward, and backward no gradient of W.

    Written plainly, W x + scale B (A x) makes two more passes over y, and (W + scale B A) x through
    autograd builds the gradient of the sum, as large as W's, only to multiply it by A and by B.
    RunLoRA (arXiv:2312.03415) compares the orders of the products.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)  # W + scale B A: (O, I)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # the sum once more costs less than to keep it
            grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scale)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)  # (tokens, I), (tokens, O)
        grad_a = grad_b = None  # rows of tokens: with columns, BLAS is several times slower
        if ctx.needs_input_grad[3]:
            grad_a = ctx.scale * (b.T @ grad.T) @ x  # (R, tokens) @ (tokens, I)
        if ctx.needs_input_grad[4]:
            grad_b = ctx.scale * ((a @ x.T) @ grad).T  # ((R, tokens) @ (tokens, O)).T
        return grad_x, None, None, grad_a, grad_b, None


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
        return self.linear(x, self.bias) if self.enabled else F.linear(x, self.weight, self.bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + scale B A dropout(x) + bias (..., O) for x (..., I)."""
        if self.sums(x):
            args = (x, self.weight, bias, self.lora_a, self.lora_b, self.scale)
            return cast(Tensor, SummedProduct.apply(*args))  # type: ignore[no-untyped-call]
        return F.linear(x, self.weight, bias) + self.update(self.dropout(x))

    def sums(self, x: Tensor) -> bool:
        """Return whether to compute W + scale B A first, for x (..., I).

        It pays where the sum costs less than the update of every token. It needs the input
        without dropout, a frozen W, and float32: in 16 bits the sum would round small updates off.
        """
        if self.dropout.p > 0 and self.training:
            return False
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != self.weight.dtype:
            return False
        if x.ndim < 2 or torch.is_autocast_enabled(x.device.type):
            return False
        return x.numel() // self.in_features > min(self.weight.shape)

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
