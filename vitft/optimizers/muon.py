"""Muon: matrices and their gradients in; updates of equal size in every direction out.

The update is the momentum's nearest semi-orthogonal matrix, found by Newton-Schulz iterations
(K. Jordan et al., 2024), times 0.2 sqrt(larger side), so that AdamW's learning rates and weight
decay fit (arXiv:2502.16982, equation 4). Matrices of one shape are iterated as one batch.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

A, B, C = 3.4445, -4.7750, 2.0315  # x -> a x + b x^3 + c x^5 takes singular values to about 1


class Muon(torch.optim.Optimizer):
    """Muon for matrices (O, I), with Nesterov momentum and decoupled weight decay.

    It differs from torch.optim.Muon in speed: that one iterates one matrix after another, and in
    bfloat16 on CPUs too, where it is slow. Here it is bfloat16 on CUDA and float32 elsewhere.

    Args:
        params: the matrices, or groups of them.
        lr: the learning rate.
        weight_decay: a step multiplies a matrix by 1 - lr * weight_decay.
        momentum: share of the earlier gradients in their running mean.
        n_iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        n_iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "momentum": momentum, "n_iterations": n_iterations})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for shape, matrices in by_shape.items():
                directions = [_as_wide(x) for x in self._directions(matrices, group["momentum"])]
                updates = orthogonalise(torch.stack(directions), group["n_iterations"])
                updates *= -0.2 * group["lr"] * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                pairs = zip(matrices, updates, strict=True)
                torch._foreach_add_(matrices, [u if len(m) == len(u) else u.T for m, u in pairs])
        return loss

    def _directions(self, matrices: Sequence[Tensor], momentum: float) -> Sequence[Tensor]:
        """Return what to orthogonalise: the gradients, pulled towards their running means."""
        means, gradients = [], []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            means.append(state["momentum"])
            gradients.append(matrix.grad)
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, means, momentum)


def orthogonalise(x: Tensor, n_iterations: int) -> Tensor:
    """Return matrices (n, rows, columns) whose singular values, except tiny ones, are near 1.

    There must be at least as many columns as rows. Five iterations bring the values to 0.7..1.2.
    """
    dtype, x = x.dtype, x.bfloat16() if x.is_cuda else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.to(dtype)


def _as_wide(matrix: Tensor) -> Tensor:
    """Return the matrix, or its transpose where it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
