"""DoRA: LoRA whose rows are scaled to trained lengths (arXiv:2402.09353).

The bias is not scaled. Autograd takes the length that a row is divided by as a constant (section
4.3 of the paper).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.methods.lora import LoRAConfig, LoRALinear


class DoRALinear(LoRALinear):
    """y = c (W x + scale B A x) + b; c = magnitude / ||W + scale B A||, one number for each row."""

    def __init__(
        self, base: nn.Linear, *, rank: int, scale: float, dropout: float, init: str
    ) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout, init=init)
        self.magnitude = nn.Parameter(self.row_norm())  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I); as in PEFT, dropout does not change the base's W x."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        c = self.magnitude / self.row_norm()  # (O,)
        if self.training and self.dropout.p > 0:
            dropped = self.dropout(x)
            z = F.linear(dropped, self.weight)
            y = c * (z + self.update(dropped)) + F.linear(x - dropped, self.weight)
        else:
            z = self.product(x, None)
            y = c * z
        return (y if self.bias is None else y + self.bias).to(z.dtype)

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        return super().terms() | {"gain": self.magnitude / self.row_norm()}

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """Return ||W + scale B A|| of every row (O,), in float32 or wider.

        A closed form would need no (O, I) temporary but three thin products, and is slower.
        """
        norm: Tensor = torch.linalg.vector_norm(super().adapted_weight(), dim=1)
        return norm

    def adapted_weight(self) -> Tensor:
        """Return c (W + scale B A) (O, I), in float32 or wider."""
        c = self.magnitude / self.row_norm()
        return c[:, None] * super().adapted_weight()


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA: LoRA that also trains the length of each row of the weight (arXiv:2402.09353).

    Raises:
        ValueError: an option is out of its range.
    """

    layer = DoRALinear
    peft_marks = {"peft_type": "LORA", "use_dora": True}
    peft_tensors = LoRAConfig.peft_tensors | {"magnitude": "lora_magnitude_vector"}

    def adapt(self, module: nn.Module, name: str) -> LoRALinear:
        """Return the DoRA layer that replaces a plain `nn.Linear`.

        Raises:
            ValueError: as for LoRA, or a row of the weight is zero and so has no direction.
        """
        adapted = super().adapt(module, name)
        if not adapted.weight.any(dim=1).all():
            raise ValueError(
                f"{name!r} has rows of zeros, whose direction DoRA cannot scale; use LoRA there"
            )
        return adapted
