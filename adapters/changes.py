"""A trained model in; what training added to each weight of the base out."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adapters.identity import whole
from adapters.layers import AffineLayer, wide
from adapters.record import adapter_layer, injection, unwrapped
from adapters.restore import gathered

Update = tuple[str, Tensor, Tensor]  # a module's name, the base's weight W, and W' - W


@torch.no_grad()
def updates(model: nn.Module) -> Iterator[Update]:
    """Yield for each adapted layer its name, the base's weight W, and the W' - W of merging.

    Then it yields the `differences` of each trained module, such as the head. The tensors
    are in float32 or wider, (O, I) of a linear and (D,) of a norm, one layer at a time. A layer
    that changes no weight, such as prompts or a bottleneck beside it, is left out; one that changes
    only the bias has an update of zeros.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record, inner = injection(model), unwrapped(model)
    for name in record.adapted:
        layer = gathered(adapter_layer(inner, name))
        if isinstance(layer, AffineLayer):
            weight = wide(layer.weight.detach())
            yield name, weight, layer.adapted_weight().detach() - weight
    for name, base in record.trained.items():
        for inside, weight, update in differences(inner.get_submodule(name), base):
            yield f"{name}.{inside}".removesuffix("."), weight, update


@torch.no_grad()
def differences(model: nn.Module, base: nn.Module) -> Iterator[Update]:
    """Yield for each module of `base` that has a weight its name, W, and W' - W in `model`.

    The tensors are in float32 or wider, (D,), or (O, I), where I takes all axes of W but the first.
    A module that `model` lacks, or whose weight has another shape there, is left out.
    """
    trained = dict(model.named_modules())
    for name, module in base.named_modules():
        before = module._parameters.get("weight")
        after = trained[name]._parameters.get("weight") if name in trained else None
        if before is not None and after is not None and before.shape == after.shape:
            now = wide(whole(after.detach()))
            weight = wide(whole(before.detach())).to(now.device)
            yield name, *(t.flatten(1) if t.ndim > 1 else t for t in (weight, now - weight))


def effective_rank(update: Tensor) -> float:
    """Return how many directions an update (O, I) has: (sum s^2)^2 / sum s^4, of singular values s.

    That is r for r equal singular values, and less where some are smaller (the participation
    ratio). It needs one product of the update with itself, no decomposition.

    Raises:
        ValueError: the update is a vector, such as a norm's, or has more axes.
    """
    if update.ndim != 2:
        raise ValueError(f"an update of shape {tuple(update.shape)} is no matrix, and has no rank")
    update = update if len(update) <= update.shape[1] else update.T
    update = update / update.abs().max().clamp_min(torch.finfo(update.dtype).tiny)
    products = update @ update.T  # its eigenvalues are the squares of the singular values
    squares = products.square().sum().item()
    return products.trace().item() ** 2 / squares if squares else 0.0
