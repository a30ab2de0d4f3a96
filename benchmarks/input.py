"""Images a second from files to batches, beside torchvision's ImageFolder and a DataLoader.

    python -m benchmarks.input --data data/clothing
    python -m benchmarks.input                        # 12-megapixel JPEGs that it makes

Both read the same files, turn them into squares of the same side and give them in batches: vitft
as `finetune` and `evaluate` do at first (decoded once, then held), torchvision by Resize and
CenterCrop on PIL images with as many workers as cores. In turn; the medians are compared.
"""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from benchmarks.results import medians, table, write_result
from vitft.data.load import load_data
from vitft.data.named import import_torchvision
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit, Framing

CPU = torch.device("cpu")
COLUMNS = {"way": "", "images_per_second": ",.0f", "of torchvision": ".2f"}


@click.command()
@click.option("--data", help="A folder with train/CLASS.  [default: photographs that it makes]")
@click.option("--image-size", default=224, show_default=True)
@click.option("--images", "n", default=300, show_default=True, help="How many, at most.")
@click.option("--epochs", default=1, show_default=True, help="Passes; vitft decodes in the first.")
@click.option("--rounds", default=3, show_default=True)
def main(data: str | None, image_size: int, n: int, epochs: int, rounds: int) -> None:
    """Time every way in turn and print the medians."""
    with TemporaryDirectory() as folder:
        root = Path(data) if data else make_photographs(Path(folder))
        ways: dict[str, Any] = {"torchvision": torchvision_way(root, image_size, n, epochs)}
        for kernel in ("bicubic", "draft-bicubic", "draft-bilinear"):
            ways[f"vitft, {kernel}"] = vitft_way(
                root, Fit(image_size, 3, Framing(kernel=kernel)), n, epochs
            )
        counts = {name: way() for name, way in ways.items()}
        assert len({*counts.values()}) == 1, counts
        times = medians({name: timer(way) for name, way in ways.items()}, rounds)
    count = next(iter(counts.values()))
    rows = [
        {
            "way": name,
            "images_per_second": count / seconds,
            "of torchvision": times["torchvision"] / seconds,
        }
        for name, seconds in times.items()
    ]
    facts: dict[str, Any] = {"data": data or "12 megapixels", "image_size": image_size}
    facts |= {"images": count // epochs, "epochs": epochs}
    name = f"input_{Path(data).name if data else 'large'}{f'_{epochs}' if epochs > 1 else ''}_cpu"
    path = write_result(name, rows, **facts)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


def torchvision_way(root: Path, image_size: int, n: int, epochs: int) -> Any:
    """Return a function that reads images by torchvision, and counts them."""
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(image_size, bicubic), transforms.CenterCrop(image_size)]
    steps.append(transforms.PILToTensor())
    dataset = torchvision.datasets.ImageFolder(root / "train", transforms.Compose(steps))
    some = Subset(dataset, chosen(len(dataset), n))

    def read() -> int:
        loader = DataLoader(some, 32, num_workers=os.cpu_count() or 1)
        return sum(len(images) for _ in range(epochs) for images, _ in loader)

    return read


def vitft_way(root: Path, fit: Fit, n: int, epochs: int) -> Any:
    """Return a function that reads images as training does at first, and counts them."""
    train = load_data(str(root), fit).train
    indices = torch.tensor(chosen(len(train), n))

    def read() -> int:
        images: Images = train.subset(indices).to(CPU)
        order = torch.arange(len(images))
        return sum(len(x) for _ in range(epochs) for x, _ in images.batches(order.split(32), CPU))

    return read


def chosen(total: int, n: int) -> list[int]:
    """Return `n` indices, evenly spread."""
    return [*range(0, total, max(1, total // n))][:n]


def timer(way: Any) -> Any:
    def once() -> float:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    return once


def make_photographs(root: Path, n: int = 24) -> Path:
    """Write JPEGs of 4000x3000 pixels, as phones do, with detail of every size."""
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = np.zeros((3000, 4000, 3))
        for side in (6, 60, 600):
            small = rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(small).resize((4000, 3000)), dtype=float) / 3
        path = root / "train" / "ab"[i % 2] / f"photo{i}x.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    return root


if __name__ == "__main__":
    main()
