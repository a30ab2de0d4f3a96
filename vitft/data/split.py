"""Labelled images in; training and validation images, subsets and channel statistics out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitft.pictures.images import Images


def split(images: Images, *, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split images into training and validation images, a `fraction` of each class for validation.

    Images of one source stay together. A source with more than twice the wanted number of images
    stays in training. If every source is that large, the smallest is used for validation. A class
    of a single source is split by image; a class of a single image stays in training.

    Raises:
        ValueError: `fraction` is not in 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"val_fraction={fraction} is not in 0 <= val_fraction < 1; 0 trains on every image"
        )
    generator = torch.Generator().manual_seed(seed)
    strata = images.strata()
    train: list[int] = []
    validation: list[int] = []
    for label in strata.unique().tolist():
        groups: dict[str, list[int]] = {}
        for i in (strata == label).nonzero().flatten().tolist():
            groups.setdefault(images.sources[i], []).append(i)
        if len(groups) == 1:
            groups = {str(i): [i] for group in groups.values() for i in group}
        wanted = fraction * sum(map(len, groups.values()))
        members = list(groups.values())
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        chosen = _choose([len(group) for group in order], wanted)
        for i, group in enumerate(order):
            (validation if i in chosen else train).extend(group)
    kept, held_out = (torch.tensor(sorted(side), dtype=torch.long) for side in (train, validation))
    return images.subset(kept), images.subset(held_out)


def _choose(sizes: Sequence[int], wanted: float) -> set[int]:
    """Return indices of sizes that add up to about `wanted`, at most twice that; never all of them.

    Where every size is larger, the index of the smallest.
    """
    chosen, total = set[int](), 0
    for i, size in enumerate(sizes[:-1]):
        if total < wanted and total + size <= 2 * wanted:
            chosen.add(i)
            total += size
    if wanted and not chosen and len(sizes) > 1:
        chosen.add(min(range(len(sizes)), key=sizes.__getitem__))
    return chosen


def limit(images: Images, n: int, *, seed: int) -> Images:
    """Return `n` of the images, drawn at random, as many from each class as far as they suffice.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"limit={n} is not positive; leave it out to train on every image")
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    ranks = _ranks(images.strata()[shuffled])
    chosen = shuffled[ranks.sort(stable=True).indices[:n]]
    return images.subset(chosen.sort().values)


def few(images: Images, n: int, *, seed: int) -> Images:
    """Return `n` images of each class, drawn at random, or all of a class that has fewer.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"shots={n} is not positive; leave it out to train on every image")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[_ranks(images.strata()[order]) < n].sort().values)


def _ranks(labels: Tensor) -> Tensor:
    """Return for each of the labels (n,) how many equal ones come before it, (n,)."""
    ranks = torch.zeros_like(labels)
    for label in labels.unique():
        ranks[labels == label] = torch.arange(int((labels == label).sum()))
    return ranks


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, for pixels in 0..1.

    They are measured on at most 50,000 of the images.
    """
    order = torch.arange(len(images))[:: len(images) // 50_000 + 1]
    total, squares, n_pixels = torch.zeros(1), torch.zeros(1), 0
    for batch, _ in images.batches(order.split(1000), torch.device("cpu")):
        pixels = batch.cpu().transpose(0, 1).flatten(1).double() / 255  # (C, B * height * width)
        total, squares = total + pixels.sum(dim=1), squares + pixels.square().sum(dim=1)
        n_pixels += pixels.shape[1]
    mean = total / n_pixels
    std = (squares / n_pixels - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(
        round(value, 4) for value in std.tolist()
    )
