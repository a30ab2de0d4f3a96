"""BitFit: only the biases of linears and norms train (arXiv:2106.10199)."""

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.config import LINEARS, AdapterConfig
from adapters.layers import AdapterLinear, AdapterNorm, AffineLayer, wide
from adapters.plain import plain


class TunedBias(AffineLayer):
    """y = W x + b', or norm(x) with b'; b' starts at the base's b, which stays unchanged."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        assert self.bias is not None
        self.tuned_bias = nn.Parameter(wide(self.bias.detach()).clone())  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        bias = self.tuned_bias.to(self.bias.dtype) if self.enabled else self.bias
        return self.compute(x, self.weight, bias)

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        return {"bias": self.tuned_bias}

    def adapted_bias(self) -> Tensor:
        """Return b' (O,), in float32 or wider."""
        return wide(self.tuned_bias)


class BitFitLinear(TunedBias, AdapterLinear):
    """y = W x + b'."""


class BitFitNorm(TunedBias, AdapterNorm):
    """y = norm(x) with b'."""


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """BitFit: only the biases of linears and norms train (arXiv:2106.10199).

    A layer trains O numbers.
    """

    targets: tuple[str, ...] = (*LINEARS, "norm1", "norm2")

    peft_marks = {"peft_type": "BITFIT"}
    peft_tensors = {"tuned_bias": "bitfit_bias"}

    def suits(self, module: nn.Module) -> bool:
        """Return whether the module has a bias to train."""
        return getattr(module, "bias", None) is not None

    def adapt(self, module: nn.Module, name: str) -> TunedBias:
        """Return the layer that replaces a plain `nn.Linear` or `nn.LayerNorm`.

        Raises:
            ValueError: `module` is neither, or has no bias.
        """
        base = plain(module, name, nn.Linear, nn.LayerNorm)
        if base.bias is None:
            raise ValueError(f"{name!r} has no bias for BitFit to train; leave it out of targets")
        return BitFitLinear(base) if isinstance(base, nn.Linear) else BitFitNorm(base)
