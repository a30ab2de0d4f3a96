"""LoKr: the update is a Kronecker product (arXiv:2309.14859, section 3.3; after arXiv:2212.10650).

y = (W + scale C kron D) x + b, where C and D are about equally large, and D is a product of two
thin matrices if the rank is below half its longer side.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from adapters.config import RankConfig, option
from adapters.layers import wide
from adapters.methods.loha import DeltaLinear
from adapters.plain import plain_linear


class LoKrLinear(DeltaLinear):
    """y = (W + scale C kron D) x + b; C starts at zero.

    C and D are `c` and `d`, or `c_b c_a` and `d_b d_a`; only those that are used exist.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        decompose_both: bool,
        decompose_factor: int,
    ) -> None:
        super().__init__(base)
        self.scale = scale
        c_out, d_out = factorise(self.out_features, decompose_factor)
        c_in, d_in = factorise(self.in_features, decompose_factor)
        self._make("c", c_out, c_in, rank if decompose_both else max(c_out, c_in), zero=True)
        self._make("d", d_out, d_in, rank, zero=False)

    def _make(self, name: str, n_out: int, n_in: int, rank: int, *, zero: bool) -> None:
        """Add C or D, or its two thin factors where `rank` is small; with `zero` it starts at 0."""
        shapes = {name: (n_out, n_in)}
        if rank < max(n_out, n_in) / 2:
            shapes = {f"{name}_b": (n_out, rank), f"{name}_a": (rank, n_in)}
        for i, (key, shape) in enumerate(shapes.items()):
            tensor = wide(self.weight.new_zeros(shape))
            if i > 0 or not zero:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            self.register_parameter(key, nn.Parameter(tensor))

    def _matrix(self, name: str) -> Tensor:
        """Return C or D, from the attributes, where FSDP and torch.func put plain tensors."""
        if hasattr(self, name):
            return cast(Tensor, getattr(self, name))
        return cast(Tensor, getattr(self, f"{name}_b") @ getattr(self, f"{name}_a"))

    def delta(self) -> Tensor:
        """Return the update (O, I)."""
        return self.scale * torch.kron(self._matrix("c"), self._matrix("d"))


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(RankConfig):
    """LoKr: a Kronecker product as the update (arXiv:2309.14859, section 3.3).

    Raises:
        ValueError: an option is out of its range.
    """

    decompose_both: bool = option(False, "make the first factor of two thin matrices too")
    decompose_factor: int = option(-1, "rows and columns of the first factor; -1: near the root")

    peft_marks = {"peft_type": "LOKR"}
    sizes = {}  # no tensor shows a rank too high for thin factors
    peft_options = RankConfig.peft_options | {
        "decompose_both": "decompose_both",
        "decompose_factor": "decompose_factor",
    }
    peft_defaults = RankConfig.peft_defaults | {"decompose_both": False, "decompose_factor": -1}
    peft_tensors = {
        "c": "lokr_w1",
        "c_b": "lokr_w1_a",
        "c_a": "lokr_w1_b",
        "d": "lokr_w2",
        "d_b": "lokr_w2_a",
        "d_a": "lokr_w2_b",
    }
    peft_ignored = RankConfig.peft_ignored | {"init_weights"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(
                f"decompose_factor={self.decompose_factor} is neither positive nor -1; "
                "-1 factorises near the square root"
            )

    def adapt(self, module: nn.Module, name: str) -> LoKrLinear:
        """Return the LoKr layer that replaces a plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`.
        """
        base = plain_linear(module, name)
        rank, alpha = self.rank_and_alpha(name)
        return LoKrLinear(
            base,
            rank=rank,
            scale=alpha / rank,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
        )


def factorise(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`, the first of them `factor` if that divides it.

    Otherwise the first is the largest divisor up to the square root and, unless that is -1, up to
    `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
