"""An adapted model and inputs in; an error if a forward pass leaves one of its layers uncalled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapters.record import injection, unwrapped


@torch.no_grad()
def check(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Check by a forward pass that every adapter layer and every trained module is called.

    A layer that is not called has no effect: its parent reads the weight directly, or does not use
    it. The pass runs in evaluation mode, uncompiled; modes and random state are restored after it.

    Args:
        model: the adapted model.
        *inputs, **named: what the model takes, such as a batch of one image.

    Raises:
        ValueError: a layer is not called, the model is not adapted, or its adapters are off.
    """
    record, inner = injection(model), unwrapped(model)
    names = [*record.adapted, *record.trained]
    called: set[str] = set()
    modes = [(module, module.training) for module in model.modules()]
    parts = [(name, inner.get_submodule(name)) for name in record.adapted]
    for name in record.trained:  # a list of modules is never called itself
        parts += [(name, part) for part in inner.get_submodule(name).modules()]
    own = [vars(part).get("forward") for _, part in parts]
    try:
        for name, part in parts:
            vars(part)["forward"] = _recording(part.forward, name, called)
        with (
            torch.random.fork_rng(devices=_devices(model)),
            torch.compiler.set_stance("force_eager"),
        ):
            model.eval()(*inputs, **named)
    finally:
        for (_, part), forward in zip(parts, own, strict=True):
            vars(part).pop("forward", None)
            if forward is not None:
                vars(part)["forward"] = forward
        for module, mode in modes:
            module.training = mode
    if missed := [name for name in names if name not in called]:
        kind = type(inner.get_submodule(missed[0].rpartition(".")[0])).__name__
        raise ValueError(
            f"{', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: never called; "
            f"{kind} reads its weight directly or does without it; leave it out of targets"
        )
    record.doubtful.clear()


def _recording(forward: Callable[..., Any], name: str, called: set[str]) -> Callable[..., Any]:
    def recording(*inputs: Any, **named: Any) -> Any:
        called.add(name)
        return forward(*inputs, **named)

    return recording


def _devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices that a pass may draw random numbers on."""
    indices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return sorted(indices)
