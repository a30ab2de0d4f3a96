"""VeRA: two random matrices, frozen and the same for every layer, between two trained vectors.

y = W x + b + diag(lambda_b) B diag(lambda_d) A dropout(x) (arXiv:2310.11454, equation 2).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.config import LINEARS, AdapterConfig, check_count, check_dropout, option
from adapters.layers import AdapterLayer, wide, wide_dtype
from adapters.methods.lora import LowRankLinear
from adapters.plain import plain_linear


class Projections(nn.Module):
    """The frozen random matrices A (R, largest I) and B (largest O, R) of all layers."""

    a: Tensor
    b: Tensor

    def __init__(self, rank: int, n_in: int, n_out: int, *, seed: int, like: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (rows, columns) in {"a": (rank, n_in), "b": (n_out, rank)}.items():
            bound = math.sqrt(6 / columns)  # Kaiming uniform for ReLU (arXiv:1502.01852)
            drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            drawn = drawn.to(like.device, wide_dtype(like))
            self.register_buffer(name, drawn, persistent=False)


class VeRALinear(LowRankLinear):
    """y = W x + b + diag(lambda_b) B diag(lambda_d) A dropout(x), from x (..., I) to y (..., O)."""

    def __init__(
        self, base: nn.Linear, projections: Projections, *, d_initial: float, dropout: float
    ) -> None:
        super().__init__(base, dropout=dropout)
        self.projections = projections
        new = wide(base.weight.new_empty(0))
        self.lambda_b = nn.Parameter(new.new_zeros(self.out_features))  # (O,)
        self.lambda_d = nn.Parameter(new.new_full((len(projections.a),), d_initial))  # (R,)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(lambda_d) A (R, I) and diag(lambda_b) B (O, R), cut to this layer's size."""
        a = self.projections.a[:, : self.in_features]
        b = self.projections.b[: self.out_features]
        return self.lambda_d[:, None] * a, self.lambda_b[:, None] * b


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """VeRA: two trained vectors a layer around shared random matrices (arXiv:2310.11454).

    A layer trains O + R numbers.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = LINEARS
    rank: int = option(256, "rank of the shared random matrices")
    dropout: float = option(0.0, "dropout of the adapter's input, in training only")
    d_initial: float = option(0.1, "initial value of lambda_d")
    projection_seed: int = option(0, "seed of the random matrices")
    save_projection: bool = option(True, "keep the random matrices in the file")

    peft_marks = {"peft_type": "VERA"}
    sizes = {"rank": ("vera_lambda_d", 0)}
    peft_options = AdapterConfig.peft_options | {
        "rank": "r",
        "dropout": "vera_dropout",
        "d_initial": "d_initial",
        "projection_seed": "projection_prng_key",
        "save_projection": "save_projection",
    }
    peft_defaults = {
        "r": 256,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "projection_prng_key": 0,
        "save_projection": True,
    }
    peft_tensors = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
    peft_ignored = AdapterConfig.peft_ignored | {"init_weights"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank, "256 is usual")
        check_dropout(self.dropout)
        if not abs(self.d_initial) < math.inf:
            raise ValueError(f"d_initial={self.d_initial!r} is not finite; 0.1 is usual")
        if not 0 <= self.projection_seed < 2**63:
            raise ValueError(f"projection_seed={self.projection_seed} is not in 0 <= seed < 2**63")

    def shared(self) -> dict[str, str]:
        """Return the tensors that a file holds once for all layers: a layer's name -> PEFT's."""
        return (
            {"projections.a": "vera_A", "projections.b": "vera_B"} if self.save_projection else {}
        )

    def adapt_all(self, modules: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the VeRA layers that replace plain `nn.Linear`s.

        Raises:
            ValueError: one of them is not a plain `nn.Linear`.
        """
        linears = {name: plain_linear(module, name) for name, module in modules.items()}
        projections = Projections(
            self.rank,
            max(linear.in_features for linear in linears.values()),
            max(linear.out_features for linear in linears.values()),
            seed=self.projection_seed,
            like=next(iter(linears.values())).weight,
        )
        options: dict[str, Any] = {"d_initial": float(self.d_initial), "dropout": self.dropout}
        return {name: VeRALinear(base, projections, **options) for name, base in linears.items()}

    def adapt(self, module: nn.Module, name: str) -> VeRALinear:
        """Return the VeRA layer that replaces a single plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`.
        """
        return cast(VeRALinear, self.adapt_all({name: module})[name])
