"""An adapted model and inputs in; an error if a forward pass leaves one of its layers uncalled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters.record import Injection, injection, unwrapped
from adapters.targets import EITHER, use_of

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@torch.no_grad()
def check(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Check by a forward pass that every adapter layer and every trained module is called.

    A layer that is not called has no effect: its parent reads the weight directly, or does not use
    it. A trained module may be read instead, if the gradients of a second pass reach it. A pass
    runs in evaluation mode, uncompiled; modes and random state are restored after it.

    Args:
        model: the adapted model.
        *inputs, **named: what the model takes, such as a batch of one image.

    Raises:
        ValueError: a layer is not called, or is called while another module reads its weight too, a
            trained module neither called nor reached by gradients, the model is not adapted, or its
            adapters are off.
    """
    record, inner = injection(model), unwrapped(model)
    names = [*record.adapted, *record.trained]
    called: set[str] = set()
    parts = [(name, inner.get_submodule(name)) for name in record.adapted]
    for name in record.trained:  # a list of modules is never called itself
        parts += [(name, part) for part in inner.get_submodule(name).modules()]
    recording = [(part, partial(_recording, name=name, called=called)) for name, part in parts]
    with _replaced(recording), _evaluating(model):
        model(*inputs, **named)
    missed = [name for name in names if name not in called]
    read = {n: inner.get_submodule(n) for n in missed if n in record.trained}
    if read:
        with _evaluating(inner):  # a wrapper, such as DDP, would wait for a backward pass
            reached = _reached(inner, read, inputs, named)
        missed = [name for name in missed if name not in reached]
    if missed:
        kind = type(inner.get_submodule(missed[0].rpartition(".")[0])).__name__
        raise ValueError(
            f"{', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: never called; "
            f"{kind} reads its weight directly or does without it; leave it out of targets"
        )
    _refuse_read_too(inner, record, inputs, named)
    record.doubtful.clear()


@contextmanager
def _replaced(wrappers: Sequence[tuple[nn.Module, Wrapper]]) -> Iterator[None]:
    """Wrap the `forward` of modules, of one module perhaps several times; restore it after."""
    own = [vars(part).get("forward") for part, _ in wrappers]
    try:
        for part, wrapper in wrappers:
            vars(part)["forward"] = wrapper(part.forward)
        yield
    finally:
        for (part, _), before in zip(wrappers, own, strict=True):
            vars(part).pop("forward", None)
            if before is not None:
                vars(part)["forward"] = before


def _recording(forward: Callable[..., Any], name: str, called: set[str]) -> Callable[..., Any]:
    def recording(*inputs: Any, **named: Any) -> Any:
        called.add(name)
        return forward(*inputs, **named)

    return recording


def _refuse_read_too(
    model: nn.Module, record: Injection, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Refuse adapter layers whose parent calls them and also reads their weight, unadapted.

    In this pass the layers compute with parameters apart from the graph, so that the gradient
    reaches a weight only where something else reads it.

    Raises:
        ValueError: there is one; `merge` would change what its parent reads.
    """
    either = [name for name in record.adapted if use_of(model, name) == EITHER]
    layers = {name: model.get_submodule(name) for name in either}
    if not layers:
        return
    apart = [(layer, partial(_apart, layer)) for layer in layers.values()]
    with _replaced(apart), _evaluating(model):
        reached = _reached(model, layers, inputs, named)
    if reached:
        name = min(reached)
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        raise ValueError(
            f"{name}: called, but {kind} reads its weight too, without the adapter, and merge "
            "would change what it reads; leave it out of targets"
        )


def _apart(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def apart(*inputs: Any, **named: Any) -> Any:
        own = layer._parameters
        vars(layer)["_parameters"] = {n: p if p is None else p.detach() for n, p in own.items()}
        try:
            return forward(*inputs, **named)
        finally:
            vars(layer)["_parameters"] = own

    return apart


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, uncompiled; restore its modes and the random state after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with (
            torch.random.fork_rng(devices=_devices(model)),
            torch.compiler.set_stance("force_eager"),
        ):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _reached(
    model: nn.Module,
    read: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> set[str]:
    """Return the names of those modules of `read` that the gradient of the output reaches."""
    own = [(n, p) for n, part in read.items() for p in part.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for _, p in own]
    try:
        for _, parameter in own:
            parameter.requires_grad_(True)
        with torch.inference_mode(mode=False), torch.enable_grad():
            outputs = [t for t in _tensors(model(*inputs, **named)) if t.requires_grad]
            if not outputs or not own:
                return set()
            ones = [torch.ones_like(t) for t in outputs]
            gradients = torch.autograd.grad(outputs, [p for _, p in own], ones, allow_unused=True)
    finally:
        for (_, parameter), flag in zip(own, flags, strict=True):
            parameter.requires_grad_(flag)
    return {name for (name, _), g in zip(own, gradients, strict=True) if g is not None}


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dictionaries and objects that hold attributes."""
    seen, left = set(), [output]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, tuple | list):
            left += value
        elif hasattr(value, "__dict__"):
            left += vars(value).values()


def _devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices that a pass may draw random numbers on."""
    indices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return sorted(indices)
