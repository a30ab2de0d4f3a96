"""A run in; an error where a gradient, its loss or a weight of it is not finite."""

from typing import TYPE_CHECKING

from vitft.devices.spread import whole
from vitft.optimizers.updates import NotFinite

if TYPE_CHECKING:
    from vitft.training.run import Run


def check_finite(run: "Run") -> None:
    """Check that every step so far, the loss and the weights are finite; waits for the device.

    Raises:
        NotFinite: one is not; says which, at which step and learning rate, and what to try.
    """
    check_steps(run)
    if not run.totals[0].isfinite():
        raise not_finite(run, "the loss is not finite up to", run.step - 1)
    for name, parameter in run.trainable.items():
        if not whole(parameter.detach()).isfinite().all():
            if run.epoch == run.step == 0:
                raise NotFinite(f"{name!r} is not finite before the first step; mend the base")
            raise not_finite(run, f"{name!r} is not finite after", run.step - 1)


def check_steps(run: "Run") -> None:
    """Check that the gradient of every step so far was finite; this waits for the device.

    Raises:
        NotFinite: one was not; says at which step and learning rate, and what to try.
    """
    if (step := run.updates.steps.first_failed()) is not None:
        raise not_finite(run, "the gradient is not finite at", step)


def not_finite(run: "Run", what: str, step: int) -> NotFinite:
    """Return the error for what was found at a step of the present epoch, counted from 0."""
    tries = [f"a smaller --lr than {run.plan.lr:g}"]
    tries += [] if run.plan.clip else ["--clip 1"]
    tries += ["--precision fp32"] if run.plan.bf16 else []
    return NotFinite(
        f"{what} step {step + 1} of {run.steps_per_epoch} in epoch {run.epoch + 1}, at "
        f"learning rate {run.lr(step):.3g}; try {' or '.join(tries)}"
    )
