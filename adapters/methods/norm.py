"""Norm tuning: only the weights and biases of layer norms train (arXiv:2312.11420)."""

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.config import AdapterConfig
from adapters.layers import AdapterNorm, wide
from adapters.plain import plain


class TunedNorm(AdapterNorm):
    """y = w' normalised(x) + b', (..., D) for x (..., D); w' and b' start at the base's values."""

    def __init__(self, base: nn.LayerNorm) -> None:
        super().__init__(base)
        self.tuned_weight = nn.Parameter(wide(self.weight.detach()).clone())  # (D,)
        self.tuned_bias = None
        if self.bias is not None:
            self.tuned_bias = nn.Parameter(wide(self.bias.detach()).clone())  # (D,)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., D) for x (..., D)."""
        if not self.enabled:
            return self.compute(x, self.weight, self.bias)
        tuned, bias = self.tuned_weight.to(self.weight.dtype), self.tuned_bias
        return self.compute(x, tuned, None if bias is None else bias.to(tuned.dtype))

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        bias = self.adapted_bias()
        return {"gain": self.tuned_weight} | ({} if bias is None else {"bias": bias})

    def adapted_weight(self) -> Tensor:
        """Return w' (D,), in float32 or wider."""
        return wide(self.tuned_weight)

    def adapted_bias(self) -> Tensor | None:
        """Return b' (D,), in float32 or wider."""
        return None if self.tuned_bias is None else wide(self.tuned_bias)


@dataclass(frozen=True, kw_only=True)
class NormConfig(AdapterConfig):
    """Norm tuning: the weights and biases of layer norms train (arXiv:2312.11420).

    A layer trains 2 D numbers.
    """

    targets: tuple[str, ...] = ("norm1", "norm2", "norm")

    peft_marks = {"peft_type": "LN_TUNING"}
    peft_tensors = {
        "tuned_weight": "ln_tuning_layers.weight",
        "tuned_bias": "ln_tuning_layers.bias",
    }

    def adapt(self, module: nn.Module, name: str) -> TunedNorm:
        """Return the layer that replaces a plain `nn.LayerNorm`.

        Raises:
            ValueError: `module` is not a plain `nn.LayerNorm`.
        """
        base = plain(module, name, nn.LayerNorm)
        assert isinstance(base, nn.LayerNorm)
        return TunedNorm(base)
