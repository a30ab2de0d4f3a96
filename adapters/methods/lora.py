"""LoRA: the update of a linear is a product of two thin matrices (arXiv:2106.09685)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import RankConfig, check_dropout, option
from adapters.layers import AdapterLinear, cast_to, wide
from adapters.methods.inits import INITS
from adapters.plain import plain_linear

UNCHANGED = ("gaussian", "orthogonal", "eva", "mica")  # PEFT's inits that leave W unchanged
# values of init where B A does not start at zero: files hold them converted to a plain LoRA
CONVERTED = ("pissa", "olora")


class FoldedProduct(torch.autograd.Function):
    """y = x (W + scale B A)^T with one product forward, and no gradient of a frozen W backward.

    In plain PyTorch, W x + scale B (A x) makes two more passes over y, and for (W + scale B A) x
    autograd computes the gradient of the sum, as large as W, only to multiply it by A and by B.
    RunLoRA (arXiv:2312.03415) compares the orders of the products. Below, `T` is the number of
    tokens in a batch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """Return y (T, O) for x (T, I), W (O, I), A (R, I) and B (O, R)."""
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x (T, I), W (O, I), A (R, I) and B (O, R), which need no memory of their own."""
        x, weight, _, a, b, ctx.scale = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed, of all but the scale, for that of y (T, O)."""
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:  # computing the sum again costs less than keeping it
            grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scale)
        if ctx.needs_input_grad[1]:  # a frozen W may train inside torch.func.grad
            grad_weight = grad.T @ x
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0)
        # in this order, as BLAS is several times slower where T is the first axis of a result
        if ctx.needs_input_grad[3]:
            grad_a = ctx.scale * (b.T @ grad.T) @ x  # (R, T) @ (T, I)
        if ctx.needs_input_grad[4]:
            grad_b = ctx.scale * ((a @ x.T) @ grad).T  # ((R, T) @ (T, O)).T
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None


# torch asks for it at each call, and to work it out takes as long as a small product
FoldedProduct.forward.__signature__ = signature(FoldedProduct.forward)  # type: ignore[attr-defined]


class LowRankLinear(AdapterLinear):
    """y = W x + b + scale B A dropout(x), from x (..., I) to y (..., O)."""

    scale: float = 1.0

    def __init__(self, base: nn.Linear, *, dropout: float) -> None:
        super().__init__(base)
        self.dropout = nn.Dropout(dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what a printed layer shows of its options."""
        return f"{super().extra_repr()}, rank={len(self.factors()[0])}, scale={self.scale:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + scale B A dropout(x) (..., O) for x (..., I)."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + scale B A dropout(x) + bias (..., O) for x (..., I)."""
        if self.folds_update(x):
            a, b = self.factors()
            rows = x.flatten(0, -2)  # (T, I)
            y = FoldedProduct.apply(rows, self.weight, bias, a, b, self.scale)  # type: ignore[no-untyped-call]
            return cast(Tensor, y).unflatten(0, x.shape[:-1])
        y = F.linear(x, self.weight, bias)
        return y + self.update(self.dropout(x)).to(y.dtype)

    def folds_update(self, x: Tensor) -> bool:
        """Return whether to multiply x (..., I) by W plus the update; not with dropout."""
        return not (self.dropout.p > 0 and self.training) and super().folds_update(x)

    def update(self, x: Tensor) -> Tensor:
        """Return scale B A x (..., O) for x (..., I), in the dtype of A and B."""
        a, b = self.factors()
        return F.linear(F.linear(cast_to(x, a), a), self.scale * b)

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        a, b = self.factors()
        return {"a": a, "b": self.scale * b}

    def adapted_weight(self) -> Tensor:
        """Return W + scale B A (O, I), in float32 or wider."""
        weight, a, b = map(wide, (self.weight, *self.factors()))
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, b, a, alpha=self.scale)


class LoRALinear(LowRankLinear):
    """y = W x + b + scale B A dropout(x), from x (..., I) to y (..., O); A and B train.

    Where B A does not start at zero, its initial value B0 A0 is subtracted, so that the base's W
    stays unchanged: the update is scale (B A - B0 A0), of rank 2 R.
    """

    start_a: Tensor  # A0: (R, I)
    start_b: Tensor  # B0: (O, R)

    def __init__(
        self, base: nn.Linear, *, rank: int, scale: float, dropout: float, init: str
    ) -> None:
        super().__init__(base, dropout=dropout)
        self.scale = scale
        a, b = INITS[init](base.weight.detach(), rank, scale)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)  # (R, I), (O, R)
        self.converted = init in CONVERTED
        if self.converted:
            self.register_buffer("start_a", a.clone())
            self.register_buffer("start_b", b.clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R), or with rank 2 R where B0 A0 is subtracted."""
        if not self.converted:
            return self.lora_a, self.lora_b
        return torch.cat([self.lora_a, self.start_a]), torch.cat([self.lora_b, -self.start_b], 1)

    def exported(self) -> dict[str, Tensor]:
        """Return the layer's tensors, with A and B of the plain LoRA that computes the same."""
        a, b = self.factors()
        return self.state_dict() | {"lora_a": a.detach(), "lora_b": b.detach()}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankConfig):
    """LoRA: a trained update of low rank on linears (arXiv:2106.09685).

    Raises:
        ValueError: an option is out of its range.
    """

    dropout: float = option(0.0, "dropout of the adapter's input, in training only")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank) instead (arXiv:2312.03732)")
    lr_ratio: float = option(1.0, "learning rate of B over that of A (LoRA+, arXiv:2402.12354)")
    init: str = option("kaiming", f"initial values of A and B: {', '.join(INITS)}")

    layer: ClassVar[type[LoRALinear]] = LoRALinear
    peft_marks = {"peft_type": "LORA", "use_dora": False}
    peft_options = RankConfig.peft_options | {
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "use_rslora": "use_rslora",
    }
    peft_defaults = RankConfig.peft_defaults | {
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
    }
    sizes = {"rank": ("lora_A.weight", 0)}
    peft_tensors = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    peft_ignored = RankConfig.peft_ignored | {
        "corda_config",
        "eva_config",
        "init_lora_weights",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)
        if not 0 < self.lr_ratio < math.inf:
            raise ValueError(f"lr_ratio={self.lr_ratio!r} is not positive; LoRA+ takes 16")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is unknown; choose from {', '.join(INITS)}")

    def adapt(self, module: nn.Module, name: str) -> LoRALinear:
        """Return the LoRA layer that replaces a plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`, or the rank exceeds its sides where A
                and B start from W.
        """
        base = plain_linear(module, name)
        rank, _ = self.rank_and_alpha(name)
        if self.init in CONVERTED and rank > min(base.weight.shape):
            raise ValueError(
                f"rank={rank} exceeds the smaller side of {name!r}, {tuple(base.weight.shape)}; "
                f"choose rank from 1 to {min(base.weight.shape)} for init={self.init!r}"
            )
        scale = self.scale(name)
        return self.layer(base, rank=rank, scale=scale, dropout=self.dropout, init=self.init)

    def scale(self, name: str) -> float:
        """Return the scale of the update of the module called `name`."""
        rank, alpha = self.rank_and_alpha(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lr_factors(self) -> dict[str, float]:
        """Return factors of the learning rate, by the name of a parameter that a layer adds."""
        return {"lora_b": self.lr_ratio}

    def kept_options(self) -> dict[str, Any]:
        """Return the options that PEFT has no key for; not `init` where the file is converted."""
        options = super().kept_options()
        return {k: v for k, v in options.items() if k != "init" or v not in CONVERTED}

    def to_peft(self) -> dict[str, Any]:
        """Return the entries of an adapter_config.json; conversion doubles the rank."""
        written = super().to_peft()
        if self.init in CONVERTED:
            twice = math.sqrt(2) if self.use_rslora else 2  # so that the scale stays the same
            written["r"] *= 2
            written["lora_alpha"] *= twice
            for pattern, factor in {"rank_pattern": 2, "alpha_pattern": twice}.items():
                if pattern in written:
                    written[pattern] = {k: factor * v for k, v in written[pattern].items()}
        return written

    @classmethod
    def from_peft(cls, written: Mapping[str, Any]) -> Self:
        """Return the config in an adapter_config.json; a missing option has PEFT's default.

        Raises:
            ValueError: an option is missing, has a wrong value, or is in use but not supported.
        """
        init = written.get("init_lora_weights")
        if init not in (None, True, False, *UNCHANGED):
            raise ValueError(
                f"option init_lora_weights={init!r} changes the base's weights; convert it with "
                "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return super().from_peft(written)
