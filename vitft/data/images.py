"""Labelled images as uint8 (n, C, height, width): read, held or streamed, split and batched."""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BROKEN = (UnidentifiedImageError, Image.DecompressionBombError, OverflowError, MemoryError)
MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels
MAX_BYTES = 4 * 2**30  # a set larger than this is streamed


def to_tensor(image: Image.Image, *, image_size: int, n_channels: int) -> Tensor:
    """Return an image as uint8 (n_channels, image_size, image_size).

    It is turned upright, scaled to cover the square and cut at the centre.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    image = image.convert(MODES[n_channels])
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, n_channels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or of floats, which Pillow would clip at 255, in 8 bits.

    Raises:
        ValueError: its values are neither those of 8 or 16 bits nor in 0..1.
    """
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    deep = image.mode.startswith("I;16") or high > 255
    scale = 1 / 256 if deep else 255 if image.mode == "F" and high <= 1 else 1
    if not 0 <= low <= high < 65536:
        raise ValueError(f"its values, {low:g} to {high:g}, are not those of 8 or 16 bits")
    image = image if image.mode == "F" else image.convert("I")
    return image.point(lambda value: value * scale + 0).convert("L")


def read_image(path: str | Path, fit: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return the image file at `path` through `fit`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or a broken one.
    """
    try:
        with Image.open(path) as image:
            return fit(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (*BROKEN, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no readable image ({error}); mend or remove it") from error


@dataclass(frozen=True)
class _Chosen:
    decode: Callable[[int], Tensor]
    indices: list[int]

    def __call__(self, i: int) -> Tensor:
        return self.decode(self.indices[i])


@dataclass(frozen=True)
class _Decoded(Dataset[tuple[Tensor, Tensor]]):
    decode: Callable[[int], Tensor]
    labels: Tensor

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.decode(i), self.labels[i]

    def __len__(self) -> int:
        return len(self.labels)


def _leave_signals(_: int) -> None:
    """Leave a stop to the main process, which saves its state and then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Images:
    """Images with labels, held whole or streamed; `decode(i)` gives image i.

    Attributes:
        decode: index -> uint8 (C, height, width).
        labels: class indices (n,).
        sources: for each image what it was cut from (a video's track, say), or its own number.
        held: every image, uint8 (n, C, height, width), or what frozen stages make of it, float
            (n, ...); None where images are streamed.
    """

    def __init__(
        self, decode: Callable[[int], Tensor], labels: Tensor, sources: Sequence[str] = ()
    ) -> None:
        self.decode = decode
        self.labels = labels
        self.sources = list(sources) or [str(i) for i in range(len(labels))]
        self.held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return a hash of the labels and sources, which change where images come or go."""
        text = json.dumps([self.labels.tolist(), self.sources])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def subset(self, indices: Tensor) -> "Images":
        """Return the images at `indices` (m,), in that order."""
        chosen = indices.tolist()
        subset = Images(
            _Chosen(self.decode, chosen),
            self.labels[indices.cpu()],
            [self.sources[i] for i in chosen],
        )
        if self.held is not None:
            subset.held = self.held[indices.to(self.held.device)]
        return subset

    def to(self, device: torch.device, max_bytes: int = MAX_BYTES) -> "Images":
        """Hold the images whole on `device` if they fit into `max_bytes`; else stay streamed."""
        if self.held is None and len(self) and len(self) * self.decode(0).numel() <= max_bytes:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self.held = torch.stack(list(pool.map(self.decode, range(len(self)))))
        if self.held is not None:
            self.held, self.labels = self.held.to(device), self.labels.to(device)
        return self

    def batches(
        self, order: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images as held, or uint8 (B, C, height, width), and labels (B,), on `device`.

        They come in `order` (m,), `batch_size` at a time.
        """
        if not len(order):
            return
        if self.held is not None:
            for chosen in order.to(self.held.device).split(batch_size):
                labels = self.labels[chosen.to(self.labels.device)]
                yield self.held[chosen].to(device), labels.to(device)
            return
        pin = device.type == "cuda"
        n_workers = min(8, os.cpu_count() or 1)
        source = _Decoded(self.decode, self.labels.cpu())
        loader = DataLoader(
            source,
            batch_size,
            sampler=order.tolist(),
            num_workers=n_workers,
            pin_memory=pin,
            prefetch_factor=4,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # the global one is what training resumes with
        )
        failure = None
        try:
            for images, labels in loader:
                yield images.to(device, non_blocking=pin), labels.to(device, non_blocking=pin)
        except (ValueError, OSError) as error:  # a worker's, whose whole traceback is its text
            last = str(error).strip().rpartition("\n")[2]
            failure = last.removeprefix(f"{type(error).__name__}: ")
            error.with_traceback(None)  # which holds the loader, and so its workers
        if failure is not None:
            raise ValueError(failure)


def split(images: Images, *, fraction: float, seed: int) -> tuple[Images, Images]:
    """Return training and validation images, the latter `fraction` of each class, in whole sources.

    Sources too large for that, more than twice what is wanted, train; where all are, the smallest
    validates. A class of a single source is split by image; a class of a single image stays in
    training.

    Raises:
        ValueError: `fraction` is not in 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"val_fraction={fraction} is not in 0 <= val_fraction < 1; 0 trains on every image"
        )
    generator = torch.Generator().manual_seed(seed)
    train: list[int] = []
    validation: list[int] = []
    for label in images.labels.unique().tolist():
        groups: dict[str, list[int]] = {}
        for i in (images.labels == label).nonzero().flatten().tolist():
            groups.setdefault(images.sources[i], []).append(i)
        if len(groups) == 1:
            groups = {str(i): [i] for group in groups.values() for i in group}
        wanted = fraction * sum(map(len, groups.values()))
        members = list(groups.values())
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        taken = _choose([len(group) for group in order], wanted)
        for place, group in enumerate(order):
            (validation if place in taken else train).extend(group)
    return images.subset(torch.tensor(sorted(train))), images.subset(
        torch.tensor(sorted(validation)).long()
    )


def _choose(sizes: Sequence[int], wanted: float) -> set[int]:
    """Return the places of sizes that sum up to `wanted`, or to little more, but never of all."""
    chosen, total = set[int](), 0
    for place, size in enumerate(sizes[:-1]):
        if total < wanted and total + size <= 2 * wanted:
            chosen.add(place)
            total += size
    if wanted and not chosen and len(sizes) > 1:
        chosen.add(min(range(len(sizes)), key=sizes.__getitem__))
    return chosen


def limit(images: Images, n: int, *, seed: int) -> Images:
    """Return `n` of the images, drawn at random with as equal a number from each class as there is.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"limit={n} is not positive; leave it out to train on every image")
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels.cpu()[shuffled]
    rank_in_class = torch.zeros_like(labels)
    for label in labels.unique():
        rank_in_class[labels == label] = torch.arange(int((labels == label).sum()))
    chosen = shuffled[rank_in_class.sort(stable=True).indices[:n]]
    return images.subset(chosen.sort().values)


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation, pixels in 0..1, over <= 50,000 images."""
    order = torch.arange(len(images))[:: len(images) // 50_000 + 1]
    total, squares, n_pixels = torch.zeros(1), torch.zeros(1), 0
    for batch, _ in images.batches(order, 1000, torch.device("cpu")):
        pixels = batch.cpu().transpose(0, 1).flatten(1).double() / 255  # (C, B * height * width)
        total, squares = total + pixels.sum(dim=1), squares + pixels.square().sum(dim=1)
        n_pixels += pixels.shape[1]
    mean = total / n_pixels
    std = (squares / n_pixels - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(
        round(value, 4) for value in std.tolist()
    )
