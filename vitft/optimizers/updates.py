"""Gradients in; moved parameters out, as long as every gradient is finite."""

import torch
from torch import Tensor, nn

from vitft.devices.spread import whole
from vitft.optimizers.build import build_optimizers, set_lr
from vitft.training.plan import Plan


class NotFinite(ValueError):
    """A gradient, a loss or a weight is infinite or no number."""


class FiniteSteps:
    """Counts the steps up to the first whose gradient is not finite, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.start = 0

    def restart(self, step: int) -> None:
        """Count from this step of an epoch on, where all is finite."""
        self.start = step
        self.finite.fill_(True)
        self.count.zero_()

    def note(self, norm: Tensor) -> None:
        """Take notice of a step by its gradient's norm ()."""
        self.finite &= norm.isfinite()
        self.count += self.finite

    def first_failed(self) -> int | None:
        """Return the first step of the epoch that was not finite, or None; waits for the device."""
        return None if self.finite else self.start + int(self.count)


class Updates:
    """The parameters of a model that train, and the optimizers that move them.

    Attributes:
        parameters: by name.
        steps: counts those that were finite.
        reached: whether every parameter has had a gradient.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.parameters = _trainable(model)
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
        """Return the gradients' norm ().

        Raises:
            ValueError: the first time, where a parameter has no gradient: nothing computes with it.
        """
        if not self.reached:
            self._check_reached()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return whole(self._norm)

    def step(self) -> None:
        """Clip the gradients by their `norm`, move the parameters and drop the gradients."""
        if self.clip:
            parameters = self.parameters.values()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, self._norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Drop gradients that no step will take, so that none is added to the next step's."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def set_lr(self, lr: float) -> None:
        """Give the optimizers a learning rate."""
        set_lr(self.optimizers, lr)

    def check_same(self, model: nn.Module) -> None:
        """Check that what trains is still what trained when the run was made.

        Raises:
            ValueError: it is not, since a head was put on or an adapter injected after that.
        """
        before, now = (
            {n: id(p) for n, p in ps.items()} for ps in (self.parameters, _trainable(model))
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


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
