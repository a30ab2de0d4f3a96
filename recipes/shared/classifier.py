"""Pictures of any kind in; classes and their probabilities, or features, out."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import adapters
from recipes.shared.model import find_base_of, open_model
from recipes.shared.options import pick_device
from vitft.data.folders import find_images
from vitft.devices.cores import in_parts
from vitft.evaluation.evaluate import suitable_batch
from vitft.evaluation.task import TASKS
from vitft.hub import fetched
from vitft.model.checkpoint import load_model
from vitft.pictures.decode import read_image
from vitft.pictures.preprocess import Fit

Classes = dict[str, float]  # probability (0..1) by class, the most probable first
Picture = Any  # a file's path, a PIL image, an array (height, width[, C]), a tensor (C, h, w)
MAX_ROWS = 64  # of a forward pass: number of images times number of adapters


class Classifier:
    """Classifies pictures by a base, with no, one or several adapters.

    Several adapters answer together, in one pass through the base.

    Args:
        base: what `load_model` takes; None for the base that the adapter's run was started with.
        adapter: the folder of an adapter for that base, or its name on the hub, "hf:OWNER/NAME", or
            a sequence of these; by default the base alone.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Attributes:
        classes: the names of the classes; of several adapters, those of the first.

    Raises:
        ValueError, OSError: a file is missing or broken, or adapters can't be stacked.
    """

    def __init__(
        self,
        base: str | Path | None = None,
        adapter: str | Path | Sequence[str | Path] = (),
        *,
        device: str = "auto",
    ) -> None:
        folders = [adapter] if isinstance(adapter, str | Path) else [*adapter]
        self.names = [str(folder) for folder in folders]
        self.device = pick_device(device)
        base = None if base is None else str(base)
        if len(folders) < 2:
            self.base = open_model(base, *(self.names or [None]))  # type: ignore[list-item]
            self.model: nn.Module = self.base
            self.all_classes = [self.base.classes]
        else:
            fetched_folders = [fetched(name) for name in self.names]
            self.base = load_model(find_base_of(base, fetched_folders[0]))
            self.model = bank = adapters.Bank(self.base, fetched_folders)
            if bank.preprocessing is not None:
                self.base.preprocessing = bank.preprocessing
            self.all_classes = bank.classes[1:]  # the first are the base's
        self.model.to(self.device)
        self.fit = Fit.of(self.base)
        self.classes = self.all_classes[0]

    @property
    def batch_size(self) -> int:
        """Number of pictures in one forward pass."""
        return max(1, min(MAX_ROWS, suitable_batch(self.base)) // len(self.all_classes))

    def predict(self, pictures: Picture | Sequence[Picture], *, top: int = 5) -> Any:
        """Return the most probable classes with their probabilities, best first.

        Args:
            pictures: a file, a folder of files, a PIL image, an array (height, width[, C]) or a
                tensor (C, height, width), or a list or batch of them. Pixels are 0 to 255, or 0 to
                1 in floats.
            top: how many classes to return.

        Returns:
            Probability by class for one picture, else a list of these; with several adapters, a
            dict of these by adapter.

        Raises:
            ValueError, OSError: a picture is missing or broken, or `top` is not positive.
        """
        if top < 1:
            raise ValueError(f"top={top} is not positive; leave it out for 5")
        several = isinstance(pictures, list | tuple) or _is_folder(pictures) or _is_batch(pictures)
        found = []
        for images in self._whole(pictures):
            for rows in self.answer(images):
                best = [best_of(p, c, top) for p, c in zip(rows, self.all_classes, strict=True)]
                found.append(
                    best[0] if len(best) == 1 else dict(zip(self.names, best, strict=True))
                )
        return found if several else found[0]

    def probabilities(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Return the probabilities (n, n_classes) of pictures, as `predict` takes them.

        With several adapters, they are the first one's.

        Raises:
            ValueError, OSError: a picture is missing or broken.
        """
        n = len(self.classes)
        rows = [self.answer(images)[:, 0, :n] for images in self._whole(pictures)]
        return torch.cat([*rows, torch.zeros(0, n)])

    def features(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Return what the head reads (n, D or 2 D), of pictures as `predict` takes them.

        Raises:
            ValueError, OSError: a picture is missing or broken, or there are several adapters,
                whose features differ.
        """
        rows = [self.embed(images) for images in self._whole(pictures)]
        return torch.cat([*rows, torch.zeros(0, self.base.config.n_features)])

    def read_each(
        self, pictures: Picture | Sequence[Picture]
    ) -> Iterator[list[tuple[Picture, Tensor | ValueError | OSError]]]:
        """Yield batches of pictures, each with its tensor as `read` returns it, or with its error.

        The pictures of a batch are decoded in parallel.

        Raises:
            ValueError: a folder holds no images.
        """
        waiting = [*expand(pictures)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i in range(0, len(waiting), self.batch_size):
                some = waiting[i : i + self.batch_size]
                yield [*zip(some, pool.map(self._try, some), strict=True)]

    def _try(self, picture: Picture) -> Tensor | ValueError | OSError:
        """Return what `read` returns, or the error of a missing or broken picture."""
        try:
            return self.read(picture)
        except (ValueError, OSError) as error:
            return error

    def _whole(self, pictures: Picture | Sequence[Picture]) -> Iterator[Tensor]:
        """Yield batches of pictures, uint8 (B, C, image_size, image_size).

        Raises:
            ValueError, OSError: a picture is missing or broken.
        """
        for read in self.read_each(pictures):
            for _, image in read:
                if isinstance(image, Exception):
                    raise image
            yield torch.stack([image for _, image in read if isinstance(image, Tensor)])

    def read(self, picture: Picture) -> Tensor:
        """Return a picture as uint8 (C, image_size, image_size).

        Raises:
            ValueError, OSError: it is missing, broken or no picture.
        """
        if isinstance(picture, str | Path):
            return read_image(picture, self.fit)
        if not isinstance(picture, Image.Image):
            picture = as_image(picture)
        return self.fit(picture.copy())

    def answer(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, n_adapters, n_classes) of images, as `read` returns them.

        Without an adapter, n_adapters is 1: the base.
        """
        n, images = len(self.all_classes), images.to(self.device)

        def part(images: Tensor, ids: Tensor) -> Tensor:
            with torch.inference_mode():
                images = self.base.normalize(images)
                logits: Tensor = self.model(images) if n == 1 else self.model(images, ids)
                return TASKS[self.base.labels]().predict(logits.float())

        ids = torch.arange(1, n + 1, device=self.device).repeat(len(images))
        rows = in_parts(part, images.repeat_interleave(n, dim=0), ids)
        return rows.view(len(images), n, -1).cpu()

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (B, D or 2 D) of images, as `read` returns them.

        Raises:
            ValueError: there are several adapters.
        """
        if len(self.all_classes) > 1:
            raise ValueError("each adapter has features of its own; choose one")

        def part(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.base.features(self.base.normalize(images)).float()

        return in_parts(part, images.to(self.device)).cpu()


def expand(pictures: Picture | Sequence[Picture]) -> Iterator[Picture]:
    """Yield pictures one by one: those of a list or a batch, and the files of folders.

    Raises:
        ValueError: a folder holds no images.
    """
    several = isinstance(pictures, list | tuple) or _is_batch(pictures)
    for picture in pictures if several else [pictures]:
        if not _is_folder(picture):
            yield picture
        elif found := find_images(Path(str(picture))):
            yield from map(str, found)
        else:
            raise ValueError(f"{picture} holds no images")


def as_image(pixels: Any) -> Image.Image:
    """Return a PIL image of an array (height, width[, C]) or a tensor (C, height, width).

    Pixels are 0 to 255; floats of at most 1 are taken as pixels divided by 255.

    Raises:
        ValueError: it has another shape, other values, or no real numbers.
    """
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels  # numpy has no bfloat16
        pixels = (pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy()
    array = np.asarray(pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if (
        array.ndim not in (2, 3)
        or array.size == 0
        or (array.ndim == 3 and array.shape[2] not in (3, 4))
    ):
        raise ValueError(
            f"a picture of shape {np.shape(pixels)} is neither (height, width), (height, width, 3) "
            "nor a tensor (3, height, width)"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"pixels of dtype {array.dtype} are no real numbers")
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= 255:
        raise ValueError(
            f"pixels of {low:g} to {high:g} are neither 0 to 255 nor 0 to 1; give the picture as "
            "it is, not normalised"
        )
    scale = 255 if array.dtype.kind == "f" and high <= 1 else 1
    return Image.fromarray((array * scale).round().astype(np.uint8))


def best_of(probabilities: Tensor, classes: Sequence[str], top: int) -> Classes:
    """Return the `top` most probable classes, best first.

    Args:
        probabilities: of one image, (at least n_classes,); what lies beyond `classes` is ignored.
        classes: names of the classes.
        top: how many to return.
    """
    best = probabilities[: len(classes)].topk(min(top, len(classes)))
    return {classes[i]: p for p, i in zip(*(t.tolist() for t in best), strict=True)}


def _is_folder(picture: Picture) -> bool:
    return isinstance(picture, str | Path) and os.path.isdir(picture)  # never an error


def _is_batch(pictures: Any) -> bool:
    return isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 4
