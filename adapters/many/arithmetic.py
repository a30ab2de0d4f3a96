"""Saved adapters in, one out: weighted sums of their updates.

The sum is that of the updates, scale B A of each, so that one adapter of weight 1 gives itself
back, whatever its rank, alpha and rsLoRA. To sum the A and the B separately would be wrong:
(B1 + B2) (A1 + A2) also holds B1 A2 and B2 A1.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.folder import AdapterFolder, read_adapter
from adapters.many.factors import A, B, Factors, closest, lora_folder, read_updates

COMBINATIONS = ("cat", "svd", "ties", "dare")


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
    updates = [read_updates(one, str(folder)) for one, folder in zip(saved, folders, strict=True)]
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
    return lora_folder(factors, trained, names, next(iter(prints), None), chosen.classes, record)


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
