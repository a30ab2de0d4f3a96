"""A run at the end of an epoch: checked, validated and written to metrics.jsonl."""

import json
from typing import Any

from vitft.devices.processes import add_up, is_first
from vitft.evaluation.evaluate import Evaluation, evaluate
from vitft.files import write_bytes
from vitft.training.finite import check_finite, not_finite
from vitft.training.run import Run

MAX_SKIPPED = 0.5  # share of an epoch's steps; an epoch that skips more is an error


def validate_start(run: Run) -> None:
    """Validate a model whose head is fitted already, as epoch 0.

    Where no later epoch is better and the plan keeps the best, these weights are kept.
    """
    if run.plan.keep == "best" and len(run.validation_inputs):
        result = _validate(run)
        figures = {f"val_{name}": value for name, value in result.figures.items()}
        row = {"epoch": 0, "train_loss": None, "val_loss": result.loss, **figures}
        run.best.update(row, run.trainable)


def finish_epoch(run: Run) -> dict[str, Any]:
    """Validate, write the epoch's line of metrics.jsonl, and return it.

    Raises:
        NotFinite: a step, the loss or a weight is not finite.
    """
    add_up(run.totals)
    check_finite(run)
    if run.skipped > MAX_SKIPPED * run.steps_per_epoch:
        raise not_finite(run, f"{run.skipped} gradients are not finite up to", run.step - 1)
    loss, n_images = (run.totals[0] / run.totals[2]).item(), int(run.totals[2])
    result = _validate(run) if len(run.validation_inputs) else None
    row = {
        "epoch": run.epoch + 1,
        "train_loss": loss,
        "val_loss": result.loss if result else None,
        "val_accuracy": None,
        **({f"val_{name}": x for name, x in result.figures.items()} if result else {}),
        "lr": run.lr(run.steps_per_epoch - 1),
        **({"skipped_steps": run.skipped} if run.skipped else {}),
        "images_per_second": n_images / run.seconds,
        "seconds": run.seconds,
    }
    run.history.append(row)
    weights = run.average.values or run.trainable
    run.best.update(row, weights if run.plan.keep == "best" else {})
    lines = "".join(json.dumps(row) + "\n" for row in run.history)
    if is_first():
        write_bytes(run.folder / "metrics.jsonl", lines.encode())
    run.epoch, run.step, run.seconds, run.skipped = run.epoch + 1, 0, 0.0, 0
    run.totals.zero_()
    run.updates.steps.restart(0)
    for listen in run.listeners:
        listen(row)
    return row


def _validate(run: Run) -> Evaluation:
    with run.average.applied():
        return evaluate(run.model, run.validation_inputs, task=run.plan.task, bf16=run.plan.bf16)
