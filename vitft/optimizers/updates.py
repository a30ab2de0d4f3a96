"""Gradients in, updated parameters out, as long as every gradient is finite."""

import torch
from torch import Tensor, nn

from vitft.devices.spread import whole
from vitft.optimizers.build import build_optimizers, set_lr, trainable_parameters
from vitft.training.plan import Plan


class NotFinite(ValueError):
    """A gradient, a loss or a weight is infinite or NaN."""


class FiniteSteps:
    """Counts, on the device, the steps before the first whose gradient is not finite."""

    def __init__(self, device: torch.device) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.start = 0

    def restart(self, step: int) -> None:
        """Count anew from this step of an epoch on; everything before it was finite."""
        self.start = step
        self.finite.fill_(True)
        self.count.zero_()

    def update(self, norm: Tensor) -> None:
        """Count a step, given the norm () of its gradient."""
        self.finite &= norm.isfinite()
        self.count += self.finite

    def first_failed(self) -> int | None:
        """Return the epoch's first step that was not finite, or None; this waits for the device."""
        return None if self.finite else self.start + int(self.count)


class Updates:
    """The trainable parameters of a model, and the optimizers that update them.

    Attributes:
        parameters: the trainable parameters, by name.
        steps: counts the steps whose gradient was finite.
        reached: whether every parameter is known to get a gradient.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.parameters = trainable_parameters(model)
        self.clip = plan.clip
        self.optimizers = build_optimizers(
            model,
            name=plan.optimizer,
            lr=plan.lr,
            weight_decay=plan.weight_decay,
            lr_factors=plan.lr_factors,
            layer_decay=plan.layer_decay,
            recorded=plan.recorded,
        )
        self.steps = FiniteSteps(next(model.parameters()).device)
        self.reached = False

    def norm(self) -> Tensor:
        """Return the norm () of all gradients together; `step` clips by it.

        Raises:
            ValueError: a trainable parameter has no gradient, as the model computes without it.
        """
        if not self.reached:
            self._check_reached()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return whole(self._norm)

    def step(self) -> None:
        """Clip the gradients by the last `norm`, update the parameters and drop the gradients."""
        if self.clip:
            parameters = self.parameters.values()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, self._norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Drop the gradients without a step, so that they don't add to those of the next one."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, before each parameter group's factor."""
        set_lr(self.optimizers, lr)

    def check_same(self, model: nn.Module) -> None:
        """Check that the model still has the trainable parameters that it had at the start.

        Raises:
            ValueError: a head was replaced or an adapter injected since.
        """
        before, now = (
            {n: id(p) for n, p in parameters.items()}
            for parameters in (self.parameters, trainable_parameters(model))
        )
        if before != now:
            raise ValueError(
                "the model has other trainable parameters than when the run was made; change the "
                "model first, then make the run"
            )

    def _check_reached(self) -> None:
        if unused := [name for name, p in self.parameters.items() if p.grad is None]:
            raise ValueError(
                f"no gradient reaches {unused[0]!r} and {len(unused) - 1} more parameters: the "
                "model computes without them; leave them out of targets, or freeze them"
            )
        self.reached = True
