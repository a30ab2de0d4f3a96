"""Metrics and weights of every epoch in; those of the best epoch so far out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Best:
    """The best epoch by validation so far.

    It has the highest accuracy, or mean average precision where images have several labels; among
    equals, the lowest loss.

    Attributes:
        row: its row of metrics.jsonl; None before the first validation.
        weights: its trained parameters by name; {} where they are not kept.
    """

    def __init__(self) -> None:
        self.row: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] = {}

    def update(self, row: dict[str, Any], weights: Mapping[str, Tensor]) -> bool:
        """Keep an epoch's row and a copy of `weights` if it is the best; return whether it is.

        Args:
            row: the epoch's row of metrics.jsonl.
            weights: by name; {} where only the row is to be kept.
        """
        if row["val_accuracy"] is None:
            return False
        if self.row is not None and _merit(row) <= _merit(self.row):
            return False
        self.row = row
        self.weights = {name: p.detach().clone() for name, p in weights.items()}
        return True


def _merit(row: Mapping[str, Any]) -> tuple[float, float]:
    return row.get("val_mean_average_precision", row["val_accuracy"]), -row["val_loss"]
