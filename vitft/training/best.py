"""Epochs' validation figures in; the weights of the best epoch so far, kept and put back, out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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

    def note(self, row: dict[str, Any], parameters: Mapping[str, nn.Parameter]) -> bool:
        """Take notice of an epoch and keep `parameters` if it is the best; return whether it is."""
        if row["val_accuracy"] is None:
            return False
        if self.row is not None and _merit(row) <= _merit(self.row):
            return False
        self.row = row
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}
        return True

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters the weights of the best epoch, where they are kept."""
        for name, value in self.weights.items():
            parameters[name].copy_(value)


def _merit(row: Mapping[str, Any]) -> tuple[float, float]:
    return row.get("val_mean_average_precision", row["val_accuracy"]), -row["val_loss"]
