"""A LoRA from full fine-tuning."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from adapters.folder import PREFIX
from adapters.io import load_adapter
from adapters.layers import wide
from adapters.many.factors import closest, lora_folder
from adapters.plain import computes_as

Model = TypeVar("Model", bound=nn.Module)


def diff(
    base: Model, tuned: nn.Module, *, rank: int = 8, head: str = "head", lossy: bool = False
) -> tuple[Model, dict[str, float]]:
    """Return a LoRA of a full fine-tuning, and the share of each change that it keeps.

    A linear's update is the closest of this rank to W' - W, that of the largest singular values
    (Eckart and Young, 1936). The head, and other modules that changed, such as norms, are copied
    whole, and its classes and preprocessing are taken over.

    Args:
        base: the model before fine-tuning; adapted in place.
        tuned: the model after it, of the same modules.
        rank: of every update; at most the smaller side of its weight.
        head: name of the module to copy, which may have other classes.
        lossy: leave out changes that no adapter holds, of biases of linears and of Parameters and
            buffers outside leaf modules such as position embeddings, rather than raise.

    Returns:
        The adapted base; and by name the share of ||W' - W||^2 kept. "all" is the share over all
        parameters, those left out included.

    Raises:
        ValueError: the tuned model has other parameters, none has changed, or something changed
            that no adapter holds.
    """
    changes, moved = _changes(base, tuned, head), _moved(base, tuned, head)
    linears = {name for name, module in base.named_modules() if _is_linear(module)}
    owner = {key: key.rpartition(".")[0] for key in (*changes, *moved)}
    updates = {owner[k]: c for k, c in changes.items() if owner[k] in linears and c.ndim == 2}
    leaves = {name for name, module in base.named_modules() if name and not [*module.children()]}
    carried = {name for name in owner.values() if name in leaves - linears}
    lost = [k for k, name in owner.items() if name not in carried and k != f"{name}.weight"]
    if not updates:
        raise ValueError("no linear differs between the two models")
    if lost and not lossy:
        raise ValueError(
            f"{', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''} changed, which no adapter "
            "holds; lossy=True leaves them out"
        )
    factors, kept = {}, dict.fromkeys(carried, 1.0) | dict.fromkeys(lost, 0.0)
    for name, change in updates.items():
        factors[name], kept[name] = closest(change, min(rank, *change.shape))
    energies = {key: change.square().sum().item() for key, change in changes.items()}
    shares = {key: kept[key] if key in lost else kept[owner[key]] for key in changes}
    kept["all"] = sum(shares[k] * energies[k] for k in energies) / sum(energies.values())
    names = (*sorted(carried), head)
    states = {name: tuned.get_submodule(name).state_dict() for name in names}
    trained = {f"{PREFIX}{name}.{k}": t for name in names for k, t in states[name].items()}
    classes, record = (getattr(tuned, key, None) for key in ("classes", "preprocessing"))
    folder = lora_folder(factors, trained, names, None, classes, record)
    return load_adapter(base, folder, train=True), kept


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and computes_as(module, nn.Linear)


def _changes(base: nn.Module, tuned: nn.Module, head: str) -> dict[str, Tensor]:
    """Return the differences of the parameters outside the head that changed, by name.

    Raises:
        ValueError: the tuned model has other parameters.
    """
    # a tied parameter under each of its names, since an adapter changes one module
    before = dict(base.named_parameters(remove_duplicate=False))
    after = dict(tuned.named_parameters(remove_duplicate=False))
    changes: dict[str, Tensor] = {}
    for key in sorted(before.keys() | after.keys()):
        if key.startswith(f"{head}."):
            continue
        if key not in before or key not in after or before[key].shape != after[key].shape:
            raise ValueError(f"{key!r} is not the same parameter in both models")
        change = (wide(after[key]) - wide(before[key])).detach()
        if change.any():
            changes[key] = change
    return changes


def _moved(base: nn.Module, tuned: nn.Module, head: str) -> list[str]:
    """Return the names of the buffers outside the head that files hold and that changed."""
    before, after = base.state_dict(), tuned.state_dict()
    names = [name for name, _ in base.named_buffers() if name in before.keys() & after.keys()]
    return [
        name
        for name in names
        if not name.startswith(f"{head}.")
        and not torch.equal(before[name], after[name].to(before[name]))
    ]
