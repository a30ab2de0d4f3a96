"""Epochs' validation figures in; the weights of the best epoch so far out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Best:
    """The best epoch by validation so far.

    It has the highest accuracy, or mean average precision where images have several labels; of
    several the lowest loss.

    Attributes:
        row: its row of metrics.jsonl; None before the first validation.
        weights: its trained parameters by name; {} where they are not kept.
    """

    def __init__(self) -> None:
        self.row: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] = {}

    def note(self, row: dict[str, Any], weights: Mapping[str, Tensor]) -> bool:
        """Take notice of an epoch and keep `weights` if it is the best; return whether it is."""
        if row["val_accuracy"] is None:
            return False
        if self.row is not None and _merit(row) <= _merit(self.row):
            return False
        self.row = row
        self.weights = {name: p.detach().clone() for name, p in weights.items()}
        return True


def _merit(row: Mapping[str, Any]) -> tuple[float, float]:
    return row.get("val_mean_average_precision", row["val_accuracy"]), -row["val_loss"]
