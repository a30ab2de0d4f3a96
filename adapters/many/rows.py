"""A base and what its layers see in; an error where a first axis is not that of images.

Banks and joint passes tell rows apart by the first axis. Tokens that come as (N, B, D) would get
each other's adapters, and where N equals B nothing in a pass shows it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adapters.targets import named_modules

ALONE = "use each adapter by itself"


def refuse_tokens_first(model: nn.Module) -> None:
    """Check that no module of a base takes tokens as (N, B, D), as far as modules tell.

    Raises:
        ValueError: one has batch_first=False.
    """
    for name, module in {"the model": model, **named_modules(model)}.items():
        if getattr(module, "batch_first", True) is False:
            raise ValueError(
                f"{name} is a {type(module).__name__} with batch_first=False, for tokens "
                "(N, B, D), whose first axis is not that of images; build the base with "
                f"batch_first=True, or {ALONE}"
            )


def not_rows(x: Tensor, n_rows: int, name: str) -> ValueError:
    """Return the error for what the layer called `name` saw, whose first axis is another."""
    return ValueError(
        f"{name} saw {tuple(x.shape)}, whose first axis is not that of the {n_rows} images; leave "
        f"it out of targets, or {ALONE}"
    )


class Rows:
    """The number of rows in a pass through a joint model; None while `forward` is not called."""

    n: int | None = None

    def watch(self, model: nn.Module) -> None:
        """Take the number from the first tensor that each call of the model gets."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def check(self, x: Tensor, name: str) -> None:
        """Check that x is (rows, ..., D), or has the parts of each row one row after another.

        Raises:
            ValueError: its first axis is another.
        """
        n = self.n
        if n and (len(x) % n or (len(x) != n and n in x.shape[1:-1])):
            raise not_rows(x, n, name)

    def _begin(self, _: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        tensors = [part for part in (*inputs, *named.values()) if isinstance(part, Tensor)]
        self.n = len(tensors[0]) if tensors and tensors[0].ndim else None

    def _end(self, *_: Any) -> None:
        self.n = None
