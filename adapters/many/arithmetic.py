"""Saved adapters in, one out: weighted sums of their updates; and a LoRA from full fine-tuning.

The sum is that of the updates, scale B A of each, so that one adapter of weight 1 gives itself
back, whatever its rank, alpha and rsLoRA. To sum the A and the B separately would be wrong:
(B1 + B2) (A1 + A2) also holds B1 A2 and B2 A1.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adapters.folder import PREFIX, AdapterFolder, read_adapter
from adapters.io import load_adapter
from adapters.layers import wide
from adapters.methods.lora import LoRAConfig
from adapters.peft import by_names
from adapters.plain import computes_as

Model = TypeVar("Model", bound=nn.Module)
Factors = tuple[Tensor, Tensor]  # A (R, I) and B (O, R) of an update B A
COMBINATIONS = ("cat", "svd", "ties", "dare")
A, B = ".lora_A.weight", ".lora_B.weight"


def combine(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    *,
    how: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    head_of: int | None = None,
) -> AdapterFolder:
    """Return the weighted sum of saved LoRA adapters of one base, to be saved or loaded.

        adapters.combine(["runs/a", "runs/b"], [0.7, 0.3]).save("runs/both")

    Args:
        folders: saved LoRA adapters; each may have rsLoRA and patterns.
        weights: one for each folder; a negative one subtracts the adapter's update.
        how: "cat" is exact; its rank is the sum of the ranks. "svd" is the closest to the sum among
            updates of `rank`. "ties" keeps the largest entries of each update, elects the sign of
            each entry by their sum, and averages those that have it (arXiv:2306.01708). "dare"
            keeps random entries and divides them by `density` (arXiv:2311.03099). Both end in
            "svd".
        rank: of the result; by default the largest of the adapters'; not for "cat".
        density: share of an update's entries that "ties" and "dare" keep.
        seed: of the entries that "dare" keeps.
        head_of: index in `folders` of the adapter whose head, classes and preprocessing to take; by
            default the first, if all have the same classes, trained modules and preprocessing.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, an adapter is no LoRA or another base's, or an option is out
            of its range.
    """
    _check(how, folders, weights, density, head_of, rank)
    saved = [read_adapter(folder) for folder in folders]
    prints = {one.fingerprint for one in saved} - {None}
    if len(prints) > 1:
        raise ValueError(f"the adapters are of different bases: {', '.join(map(str, prints))}")
    updates = [_updates(one, str(folder)) for one, folder in zip(saved, folders, strict=True)]
    if head_of is None:
        _check_heads(saved)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for name in sorted({name for update in updates for name in update}):
        pairs = [
            (u[name][0], w * u[name][1]) for w, u in zip(weights, updates, strict=True) if name in u
        ]
        if how == "cat":
            factors[name] = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        else:
            total = _sum([b @ a for a, b in pairs], how, density, generator)
            most = rank or max(len(a) for a, _ in pairs)
            factors[name] = closest(total, min(most, *total.shape))[0]
    chosen = saved[head_of or 0]
    trained = {key: t for key, t in chosen.tensors.items() if not key.endswith((A, B))}
    names = chosen.config.get("modules_to_save")
    record = chosen.preprocessing
    if head_of is None:  # they agree, but some may have none
        record = next((one.preprocessing for one in saved if one.preprocessing is not None), None)
    return _folder(factors, trained, names, next(iter(prints), None), chosen.classes, record)


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
    folder = _folder(factors, trained, names, None, classes, record)
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


def closest(update: Tensor, rank: int) -> tuple[Factors, float]:
    """Return A (R, I), B (O, R) with B A closest to `update` (O, I), and the share kept.

    The share is ||B A||^2 / ||update||^2, 1 for an update of zeros.
    """
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    root, energy = s[:rank].sqrt(), s.square().sum()
    share = (s[:rank].square().sum() / energy).item() if energy else 1.0
    return (root[:, None] * v[:rank], u[:, :rank] * root), share


def _updates(saved: AdapterFolder, folder: str) -> dict[str, Factors]:
    """Return A and scale B for every adapted module by name, in float32 or wider.

    Raises:
        ValueError: the adapter is no LoRA, a tensor is missing, or one is not understood.
    """
    if not LoRAConfig.reads(saved.config):
        raise ValueError(f"{folder} is no LoRA adapter, whose updates can be added up")
    names = {k[len(PREFIX) : -len(A)] for k in saved.tensors if k.endswith(A)}
    trained = tuple(saved.config.get("modules_to_save") or ())
    for key in saved.tensors:
        module = key[len(PREFIX) :].rpartition(".")[0]
        if not (key.endswith((A, B)) or module.endswith(trained)):
            raise ValueError(f"{folder}: {key} is no factor of a linear, and would be lost")
    config = LoRAConfig.from_peft(by_names(saved.config, sorted(names) or ["none"]))
    found = {}
    for name in sorted(names):
        if (missing := f"{PREFIX}{name}{B}") not in saved.tensors:
            raise ValueError(f"{folder}: tensor {missing} is missing")
        a, b = (wide(saved.tensors[f"{PREFIX}{name}{end}"]) for end in (A, B))
        found[name] = a, config.scale(name) * b
    return found


def _check_heads(saved: Sequence[AdapterFolder]) -> None:
    """Check that all adapters have the same classes, preprocessing and shapes of trained modules.

    Raises:
        ValueError: they don't.
    """
    shapes = [
        {key: t.shape for key, t in one.tensors.items() if not key.endswith((A, B))}
        for one in saved
    ]
    if len({one.classes for one in saved}) > 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError("the adapters have other classes or heads; choose whose by head_of=0, 1")
    records = [one.preprocessing for one in saved if one.preprocessing is not None]
    if any(record != records[0] for record in records):
        raise ValueError("the adapters prepare images otherwise; choose whose way by head_of=0, 1")


def _sum(updates: list[Tensor], how: str, density: float, generator: torch.Generator) -> Tensor:
    """Return the sum of updates (O, I); TIES and DARE first drop entries of each.

    TIES returns the mean of the entries that have the elected sign, not their sum.
    """
    stacked = torch.stack(updates)  # (n, O, I)
    if how == "ties":
        size = stacked[0].numel()
        n_dropped = size - math.ceil(density * size)
        if n_dropped:
            least = stacked.flatten(1).abs().kthvalue(n_dropped, dim=1).values
            stacked = stacked * (stacked.abs() > least.view(-1, 1, 1))
        agrees = (stacked.sign() == stacked.sum(dim=0).sign()) & (stacked != 0)
        return (stacked * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    if how == "dare":
        stacked = stacked * (torch.rand(stacked.shape, generator=generator) < density) / density
    return stacked.sum(dim=0)


def _folder(
    factors: Mapping[str, Factors],
    trained: Mapping[str, Tensor],
    names: Sequence[str] | None,
    fingerprint: str | None,
    classes: tuple[str, ...] | None,
    preprocessing: dict[str, Any] | None,
) -> AdapterFolder:
    """Return updates B A as a saved LoRA, with tensors and names of the trained modules."""
    written = _config(factors).to_peft() | {"modules_to_save": names, "task_type": None}
    ends = ((A, 0), (B, 1))
    thin = {f"{PREFIX}{name}{end}": ab[i] for name, ab in factors.items() for end, i in ends}
    return AdapterFolder(
        written, thin | dict(trained), fingerprint, classes, preprocessing=preprocessing
    )


def _check(
    how: str,
    folders: Sequence[object],
    weights: Sequence[float],
    density: float,
    head_of: int | None,
    rank: int | None,
) -> None:
    """Check the options of `combine`.

    Raises:
        ValueError: one is out of its range.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"{how=} is unknown; choose from {', '.join(COMBINATIONS)}")
    if not folders or len(folders) != len(weights):
        raise ValueError(f"{len(folders)} folders and {len(weights)} weights; give one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={[*weights]} are not all finite")
    if not 0 < density <= 1:
        raise ValueError(f"{density=} is not in 0 < density <= 1; 1 keeps all")
    if head_of is not None and not 0 <= head_of < len(folders):
        raise ValueError(f"{head_of=} is no place in {len(folders)} folders, from 0")
    if rank is not None and (rank < 1 or how == "cat"):
        raise ValueError(f"{rank=} is not positive, or given for how='cat', which adds the ranks")


def _config(factors: Mapping[str, Factors]) -> LoRAConfig:
    """Return the config of updates B A of these ranks, with scale 1."""
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    most = max(ranks.values())
    fewer = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank < most}
    return LoRAConfig(
        targets=tuple(factors), rank=most, alpha=most, rank_pattern=fewer, alpha_pattern=fewer
    )
