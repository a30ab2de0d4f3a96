"""Deep visual prompt tuning: each block gets trained tokens of its own (arXiv:2203.12119, eq. 6).

A block's outputs for its prompts are dropped, and the next block gets other prompts. They stand
behind the tokens; attention does not depend on the order.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import AdapterConfig, check_count, check_dropout, option
from adapters.layers import Wrapper, wide
from adapters.plain import IMAGE, OTHER, block_width, takes


class PromptedBlock(Wrapper):
    """A block from tokens (B, N, D) to tokens (B, N, D) that attends to P prompts too."""

    prompts: nn.Parameter  # (1, P, D)
    prompt_dropout: float

    @classmethod
    def prompted(
        cls, base: nn.Module, dim: int, *, name: str, n_prompts: int, dropout: float
    ) -> "PromptedBlock":
        """Return a block of width `dim` with prompts within Xavier's bound, as in the paper."""
        layer, bound = cls.around(base), math.sqrt(6 / (2 * dim))  # of patches of D numbers
        prompts = wide(next(base.parameters()).new_empty(1, n_prompts, dim))
        layer.prompts = nn.Parameter(prompts.uniform_(-bound, bound))
        layer.prompt_dropout, layer.adapted_name = dropout, name
        return layer

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """Return the block's output (B, N, D) for x (B, N, D), without that for the prompts.

        Raises:
            ValueError: the block takes no tokens, or other tensors too, such as positions or a
                mask, which have no entries for prompts; or it returns something other than tokens.
        """
        if not self.enabled:
            return super().forward(x, *rest, **named)
        beside = [*_flat((rest, named))]
        self._check(x, beside)
        prompts = self.prompts.expand(x.shape[0], -1, -1)  # first, for a dropout mask an image
        prompts = F.dropout(prompts, self.prompt_dropout, self.training).to(x.dtype)
        tokens = torch.cat([x, prompts], dim=1)  # (B, N + P, D)
        y = super().forward(tokens, *rest, **named)
        if not isinstance(y, Tensor):
            raise self._error(f"gives a {type(y).__name__}, not tokens")
        told = [n for n in beside if type(n) is int]  # perhaps how many first tokens to give
        if y.ndim != 3 or (y.shape[:2] != tokens.shape[:2] and y.shape[1] not in told):
            raise self._error(f"gives {tuple(y.shape)} for {tuple(tokens.shape)}, not as many")
        return y[:, : x.shape[1]]

    def _check(self, x: Tensor, beside: Sequence[Any]) -> None:
        """Check that a block's input x is tokens, and that what is beside it has no part for each.

        Raises:
            ValueError: x has another shape, or there are tensors or the sides of an image beside.
        """
        if x.ndim != 3 or x.shape[-1] != self.prompts.shape[-1]:
            dim = self.prompts.shape[-1]
            raise self._error(f"saw {tuple(x.shape)}, not tokens (B, N, {dim})")
        if any(isinstance(part, Tensor) for part in beside):
            raise self._error("reads positions or a mask beside its tokens")
        for height, width in pairwise(n for n in beside if type(n) is int):
            if height * width == x.shape[1] and height > 1 < width:
                raise self._error(f"takes its {x.shape[1]} for an image of {height} x {width}")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"VPT adds tokens, but {self.adapted_name!r} {what}; {OTHER}")


@torch.no_grad()
def _sees_other_tokens(block: nn.Module, dim: int) -> bool:
    """Return whether a block's output (1, 2, D) for two tokens depends on a third, as far as known.

    It does not where attention takes the first axis for that of tokens, (N, B, D).
    """
    if all(m.batch_first for m in block.modules() if isinstance(m, nn.MultiheadAttention)):
        return True
    x = torch.randn(1, 3, dim, generator=torch.Generator().manual_seed(0))
    x = x.to(next(block.parameters()))
    other = torch.cat([x[:, :2], -x[:, 2:]], dim=1)
    try:
        twin = copy.deepcopy(block).eval()
        return not torch.equal(twin(x)[:, :2], twin(other)[:, :2])
    except Exception:
        return True  # it takes more than tokens


def _flat(value: Any) -> Iterator[Any]:
    """Yield the values in nested tuples, lists and dictionaries."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


@dataclass(frozen=True, kw_only=True)
class VPTConfig(AdapterConfig):
    """Visual prompt tuning: each block attends to trained tokens too (arXiv:2203.12119).

    A block trains P D numbers. It can't be merged: the prompts are tokens, not weights.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = (r"(.*\.)?blocks\.\d+",)
    n_prompts: int = option(10, "prompts in a block")
    dropout: float = option(0.0, "dropout of the prompts, in training only")

    peft_marks = {"peft_type": "VPT"}
    sizes = {"n_prompts": ("vpt_prompts", 1)}
    peft_options = AdapterConfig.peft_options | {"n_prompts": "n_prompts", "dropout": "dropout"}
    peft_tensors = {"prompts": "vpt_prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_prompts", self.n_prompts, "try 10")
        check_dropout(self.dropout)

    def adapt(self, module: nn.Module, name: str) -> PromptedBlock:
        """Return the layer that replaces a block with layer norms on its tokens.

        Raises:
            ValueError: `module` holds Parameters itself, has no layer norm, attends within windows,
                or takes images or tokens (N, B, D).
        """
        dim = block_width(module, name, "VPT")
        sizes = [getattr(part, "window_size", None) for part in module.modules()]
        if size := next(filter(None, sizes), None):
            raise ValueError(
                f"{name!r} has window_size={size}, for windows or images of one size, so that "
                f"prompts have no place; {OTHER}"
            )
        if not takes(module, 1, 4, dim) and takes(module, 1, *IMAGE, dim):
            raise ValueError(
                f"{name!r} takes images (B, H, W, {dim}), not tokens (B, N, D), so that prompts "
                f"have no place; {OTHER}"
            )
        if not _sees_other_tokens(module, dim):
            raise ValueError(
                f"{name!r} takes tokens (N, B, D), not (B, N, D), so that prompts would be other "
                f"images to it; {OTHER}"
            )
        return PromptedBlock.prompted(
            module, dim, name=name, n_prompts=self.n_prompts, dropout=self.dropout
        )
