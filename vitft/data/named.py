"""The name of a data set in, drawn by the program or torchvision's; its images by split out."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

import torch
from PIL import Image
from torch import Tensor

from vitft.data.listing import ImageSet
from vitft.data.shapes import CLASSES as DRAWN
from vitft.data.shapes import draw
from vitft.data.sources import source_of
from vitft.pictures.cache import data_folder
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit

N_DRAWN = {"train": 6000, "test": 2000}  # images of a drawn set

# name -> (class in torchvision.datasets, arguments for the training split, for the test split)
DATASETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "country211": ("Country211", {"split": "train"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "emnist": (
        "EMNIST",
        {"split": "balanced", "train": True},
        {"split": "balanced", "train": False},
    ),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "fgvcaircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "gtsrb": ("GTSRB", {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "val"}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "pcam": ("PCAM", {"split": "train"}, {"split": "test"}),
    "qmnist": ("QMNIST", {"what": "train"}, {"what": "test"}),
    "renderedsst2": ("RenderedSST2", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "usps": ("USPS", {"train": True}, {"train": False}),
}


def is_named_set(name: str) -> bool:
    """Return whether a set has this name."""
    return name in DRAWN or name.lower() in DATASETS


@dataclass(frozen=True)
class _DrawnImages:
    """Drawn images, called with i for image i."""

    pixels: Any  # uint8 (n, height, width, C)
    fit: Fit

    def __call__(self, i: int) -> Tensor:
        return self.fit(Image.fromarray(self.pixels[i]))


@dataclass(frozen=True)
class _TorchvisionImages:
    """The images of a torchvision data set, called with i for image i."""

    dataset: Any  # an item is (PIL image, label)
    fit: Fit

    def __call__(self, i: int) -> Tensor:
        return self.fit(self.dataset[i][0])


def load_named(name: str, fit: Fit) -> ImageSet:
    """Return the set of this name.

    Raises:
        ValueError: no set has that name.
        OSError: it is not on this machine and could not be downloaded.
    """
    if name in DRAWN:
        return _load_drawn(name, fit)
    if name.lower() in DATASETS:
        return _load_torchvision(name.lower(), fit)
    known = ", ".join([*DRAWN, *DATASETS])
    raise ValueError(
        f"unknown data set {name}: neither a folder, a CSV, TSV or Parquet file, nor one of {known}"
    )


def _load_drawn(name: str, fit: Fit) -> ImageSet:
    def images(seed: int, n: int) -> Images:
        pixels, labels = draw(name, n, seed=seed)
        return Images(_DrawnImages(pixels.permute(0, 2, 3, 1).numpy(), fit), labels)

    train, test = images(0, N_DRAWN["train"]), images(1, N_DRAWN["test"])
    return ImageSet.of(name, DRAWN[name], fit, train, test)


def _load_torchvision(name: str, fit: Fit) -> ImageSet:
    class_name, *splits = DATASETS[name]
    root = data_folder() / name
    train, test = (
        _open(getattr(import_torchvision().datasets, class_name), root, split) for split in splits
    )
    labels = [torch.tensor(_labels(dataset)) for dataset in (train, test)]
    names = getattr(train, "classes", None) or range(int(labels[0].max()) + 1)
    classes = tuple(str(name if isinstance(name, (str, int)) else name[0]) for name in names)
    samples = getattr(train, "_samples", None) or ()
    sources = [source_of(Path(path)) for path, _ in samples if isinstance(path, (str, Path))]
    images = Images(_TorchvisionImages(train, fit), labels[0], sources)
    return ImageSet.of(name, classes, fit, images, Images(_TorchvisionImages(test, fit), labels[1]))


def import_torchvision() -> Any:
    """Return torchvision, also where its compiled operators were built for another torch.

    Its import then fails, unless operators of these names exist; data sets call none of them.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


# Operators vanish with the library that defines them, so it lives as long as this module.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def _open(dataset: Callable[..., Any], root: Path, arguments: dict[str, Any]) -> Any:
    """Return a torchvision data set that is under `root`, downloaded where it is not."""
    try:
        return dataset(root, **arguments)  # works without a network if the files are there
    except (RuntimeError, OSError):
        pass
    try:
        return dataset(root, download=True, **arguments)
    except ImportError as error:
        raise ValueError(f"the set needs another package: {error}") from error
    except (RuntimeError, OSError, EOFError, BadZipFile, TarError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"could not download to {root} ({reason}); put the files there on a machine "
            "with a network, or use --data FOLDER with train/CLASS and test/CLASS, "
            "or --data shapes, which needs none"
        ) from error


def _labels(dataset: Any) -> list[int]:
    """Return the labels, without decoding images where the data set has them in a list."""
    for name in ("targets", "labels", "_labels"):
        if (labels := getattr(dataset, name, None)) is not None:
            labels = torch.as_tensor(labels).long()
            if labels.ndim == 2:  # QMNIST's have 8 columns, the class first
                labels = labels[:, 0]
            return labels.tolist()
    if samples := getattr(dataset, "_samples", None):
        return [label for _, label in samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]
