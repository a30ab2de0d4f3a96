"""A module in; the same module out, or an error that says why no adapter can replace it."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

OTHER = "choose another method"


def plain(module: nn.Module, name: str, *kinds: type[nn.Module]) -> nn.Module:
    """Return `module` if it has weights and computes what one of these classes does.

    Args:
        module: to be adapted.
        name: of the module, for messages.
        *kinds: nn.Linear, nn.LayerNorm or both.

    Raises:
        ValueError: it is of another class, computes something else, has no floating-point weights
            or other tensors too; the message says which.
    """
    names, kind = " or ".join(f"nn.{k.__name__}" for k in kinds), type(module).__name__
    if not isinstance(module, kinds):
        raise ValueError(f"{name!r} is a {kind}, not an {names}")
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{name!r} has no weight to adapt")
    if weight.is_meta:
        raise ValueError(f"{name!r} has no weights yet (device meta); load the base, then inject")
    if not weight.is_floating_point():
        raise ValueError(
            f"{name!r} has weights of {weight.dtype}; adapters need a floating-point base"
        )
    state = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if own := sorted({*state} - {"weight", "bias"}):
        raise ValueError(f"{name!r} is a {kind} with {own[0]!r} too, which an adapter would lose")
    if not computes_as(module, next(k for k in kinds if isinstance(module, k))):
        raise ValueError(
            f"{name!r} is a {kind}, which computes something else than the {names} that it derives "
            "from; leave it out of targets"
        )
    return module


@torch.no_grad()
def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module of a subclass computes what `kind`, nn.Linear or nn.LayerNorm, does.

    It does if its `forward` is that of `kind`, or gives the same for random tokens (2, 3, I), in
    training as in evaluation. I may be several axes of a norm.
    """
    if type(module).forward is kind.forward:
        return True
    weight = cast(nn.Parameter, module.weight)
    generator = torch.Generator().manual_seed(0)
    inputs = weight.shape[1:] if kind is nn.Linear else weight.shape
    x = torch.randn(2, 3, *inputs, generator=generator).to(weight)
    tolerance = 8 * torch.finfo(weight.dtype).eps
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            twin = copy.deepcopy(module)
            both = [type(module).forward(twin.train(mode), x) for mode in (False, True)]
        expected = kind.forward(module, x)
    except Exception:
        return False  # its forward does not take tokens
    return all(
        y.shape == expected.shape and torch.allclose(y, expected, tolerance, tolerance)
        for y in both
    )


def plain_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return `module` if an `AdapterLinear` can take its place.

    Raises:
        ValueError: it is not a plain `nn.Linear`; the message says why.
    """
    linear = plain(module, name, nn.Linear)
    assert isinstance(linear, nn.Linear)
    return linear


def made_of_children(module: nn.Module, name: str) -> nn.Module:
    """Return `module` if all its weights are its children's, so that a `Wrapper` can replace it.

    Raises:
        ValueError: it holds Parameters or buffers itself, or none at all; or they are on meta.
    """
    if module._parameters or module._buffers or not any(True for _ in module.parameters()):
        raise ValueError(
            f"{name!r} is a {type(module).__name__} with weights of its own or none; only a module "
            "made of others is wrapped"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"{name!r} has no weights yet (device meta); load the base, then inject")
    return module


def block_width(module: nn.Module, name: str, method: str) -> int:
    """Return the width D of a block's tokens, that of its first layer norm.

    Raises:
        ValueError: `module` holds Parameters itself, has no layer norm on tokens, or takes channels
            first.
    """
    norms = [m for m in made_of_children(module, name).modules() if isinstance(m, nn.LayerNorm)]
    if not norms:
        raise ValueError(f"{name!r} has no nn.LayerNorm that tells its width; {method} needs one")
    if len(shape := norms[0].normalized_shape) > 1:
        raise ValueError(
            f"{name!r} has a norm over {tuple(shape)}, not over the width of tokens; {method} "
            f"needs one over that; {OTHER}"
        )
    refuse_channels_first(module, name, shape[0])
    return shape[0]


IMAGE = (56, 112)  # sides that windows of 7, 8 or 14 divide


def refuse_channels_first(module: nn.Module, name: str, dim: int) -> None:
    """Check that a module does not take images (B, D, H, W), as far as a pass on meta tells.

    Raises:
        ValueError: it takes them, and neither tokens (B, N, D) nor images (B, H, W, D).
    """
    if takes(module, 1, 4, dim) or takes(module, 1, *IMAGE, dim):
        return
    if takes(module, 1, dim, *IMAGE):
        raise ValueError(
            f"{name!r} takes channels first, (B, {dim}, H, W), not tokens (B, N, D); {OTHER}"
        )


@torch.no_grad()
def takes(module: nn.Module, *shape: int) -> bool:
    """Return whether a module gives as much as it is given in this shape, alone and in eval mode.

    A copy on device meta computes shapes only. False also where something else stands against it.
    """
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in tensors}
    x = torch.empty(shape, dtype=tensors[0].dtype, device="meta")
    try:
        twin = copy.deepcopy(module, memo).eval()
        for part in twin.modules():  # a hook may note what it sees
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        with torch.random.fork_rng(devices=[]):
            y = twin(x)
    except Exception:
        return False
    y = y[0] if isinstance(y, tuple) and y else y
    return isinstance(y, Tensor) and y.shape == x.shape
