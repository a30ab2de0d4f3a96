"""Visual prompts, deep: every block reads trained tokens beside its own (arXiv:2203.12119, eq. 6).

The block's outputs for the prompts are dropped; the next block has prompts of its own. Where the
prompts stand among the tokens means nothing to attention, so they stand last.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.config import AdapterConfig, check_count, check_dropout, option, partless
from adapters.layers import Wrapper


class PromptedBlock(Wrapper):
    """A block from tokens (B, N, D) to tokens (B, N, D) that reads P prompts besides."""

    def __init__(self, base: nn.Module, dim: int, *, n_prompts: int, dropout: float) -> None:
        super().__init__(base)
        bound = math.sqrt(6 / (2 * dim))  # Xavier's, the paper's for patches of D numbers
        prompts = next(base.parameters()).new_empty(1, n_prompts, dim)
        self.prompts = nn.Parameter(prompts.uniform_(-bound, bound))  # (1, P, D)
        self.prompt_dropout = nn.Dropout(dropout)

    def adapted(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return the block's tokens (B, N, D), or the first of them, for x (B, N, D)."""
        prompts = self.prompt_dropout(self.prompts).to(x.dtype).expand(len(x), -1, -1)
        y: Tensor = self.base(torch.cat([x, prompts], dim=1), *rest, **named)  # (B, N + P, D)
        return y[:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True)
class VPTConfig(AdapterConfig):
    """Visual prompts, deep: trained tokens that every block reads besides (arXiv:2203.12119).

    A block trains P D numbers. It can't be merged: the prompts are tokens, no weights.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = (r"(.*\.)?blocks\.\d+",)
    n_prompts: int = option(10, "prompts in a block")
    dropout: float = option(0.0, "of the prompts, in training only")

    peft_marks = {"peft_type": "VPT"}
    peft_options = AdapterConfig.peft_options | {"n_prompts": "n_prompts", "dropout": "dropout"}
    peft_tensors = {"prompts": "vpt_prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_prompts", self.n_prompts, "try 10")
        check_dropout(self.dropout)

    def adapt(self, module: nn.Module, name: str) -> PromptedBlock:
        """Return the layer that takes the place of a block with layer norms on its tokens.

        Raises:
            ValueError: `module` holds Parameters itself, or has no norm that tells the width.
        """
        norms = [part for part in partless(module, name).modules() if type(part) is nn.LayerNorm]
        if not norms:
            raise ValueError(f"{name!r} has no nn.LayerNorm, so it is no block to prompt")
        dim = norms[0].normalized_shape[-1]
        return PromptedBlock(module, dim, n_prompts=self.n_prompts, dropout=self.dropout)
