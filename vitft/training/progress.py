"""A run's metrics in; lines for the user who watches, out."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from vitft.evaluation.probe import FIGURES
from vitft.training.run import Run


def show(run: Run, bar: "tqdm[Any]") -> None:
    """Show the epoch's loss and accuracy so far in the progress bar; waits for the device."""
    loss, accuracy, _ = (run.totals / run.totals[2]).tolist()
    bar.set_postfix_str(
        f"epoch {run.epoch + 1}/{run.plan.epochs}, loss {loss:.3f}, accuracy {accuracy:.1%}",
        refresh=False,
    )


def frozen_line(figures: Mapping[str, float]) -> str:
    """Return the figures of the base's features before anything trains, as a line."""
    told = [
        f"{name.replace('_', ' ')} {figures[f'knn_{name}']:.2%} by nearest neighbours, "
        f"{figures[f'probe_{name}']:.2%} by a linear probe"
        for name in FIGURES
        if f"knn_{name}" in figures
    ]
    return f"frozen features: {'; '.join(told)}"


def epoch_line(row: dict[str, Any]) -> str:
    """Return an epoch's row of metrics.jsonl as a line for the user."""
    validation = ""
    if row["val_loss"] is not None:
        validation = f"  validation {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.2%}"
        if (precision := row.get("val_mean_average_precision")) is not None:
            validation += f", mean average precision {precision:.2%}"
    if skipped := row.get("skipped_steps"):
        validation += f"  {skipped} steps skipped: gradients not finite"
    speed = f"{row['images_per_second']:,.0f} images/s, {row['seconds']:.1f} s"
    return f"epoch {row['epoch']:>3}  loss {row['train_loss']:.3f}{validation}  {speed}"
