"""Adapters trained together, in turn with the same adapters trained one after the other.

    python -m benchmarks.sweep

Seconds of a step of all: one joint pass forward and backward, and the updates, against as many
ordinary steps. Ranks and learning rates differ, as in a sweep.
"""

import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch import Tensor

import adapters
from benchmarks.results import medians, table, write_result
from vitft import VisionTransformer, load_model
from vitft.pictures.images import Images
from vitft.training.loop import synchronize
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step

WAYS = ("together", "one by one")
COLUMNS = {"batch_size": "", "layers": "", "together": ".2f", "one by one": ".2f", "ratio": ".3f"}


def members(
    base: str, layers: tuple[int, ...], n: int, batch_size: int, device: str, folder: Path
) -> tuple[dict[str, list[Step]], tuple[Tensor, Tensor]]:
    """Return the steps of `n` adapters of one seed, together and one by one, and their batch."""
    plain = load_model(base).to(device)
    size = plain.config.image_size
    pixels = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, len(plain.classes), (batch_size,))
    pixels, labels = pixels.to(device), labels.to(device)
    images = Images(lambda i: pixels[i], labels).to(torch.device(device))
    runs = []
    for i in range(n):
        model = adapters.shared_copy(plain)
        config = adapters.LoRAConfig(
            rank=(2, 4, 8, 16)[i % 4], layers=layers, targets=("wq", "wk", "wv", "wo")
        )
        adapters.inject(model, config, trainable=("head",))
        plan = Plan(epochs=1, batch_size=batch_size, lr=1e-3 * 3 ** -(i // 4), weight_decay=0.0)
        runs.append(Run(model.train(), images, images, plan, folder))
        runs[-1].steps_per_epoch = 1000

    def join(models: list[VisionTransformer]) -> VisionTransformer:
        return adapters.together(plain, models)

    steps = {"together": [Step(runs, join)], "one by one": [Step([run], join) for run in runs]}
    return steps, (pixels, labels)


@click.command()
@click.option("--base", default="cifar10", show_default=True, help="As in vitft finetune.")
@click.option("--adapters", "n", default=12, show_default=True)
@click.option("--batch-sizes", default="16,64", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(base: str, n: int, batch_sizes: str, rounds: int, device: str) -> None:
    """Time both in turn and print the medians."""
    rows = []
    for batch_size, layers in product(map(int, batch_sizes.split(",")), ((), (4, 5))):
        with TemporaryDirectory() as folder:
            steps, pair = members(base, layers, n, batch_size, device, Path(folder))
            times = medians(
                {name: timer(some, pair, device) for name, some in steps.items()}, rounds
            )
        ratio = times["together"] / times["one by one"]
        row = {"batch_size": batch_size, "layers": ",".join(map(str, layers)) or "all"}
        rows.append(row | times | {"ratio": ratio})
        click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result(f"sweep_{device}", rows, adapters=n, rounds=rounds)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


def timer(steps: Sequence[Step], batch: tuple[Tensor, Tensor], device: str) -> Callable[[], float]:
    """Return a function that takes the steps and returns the seconds."""

    def timed() -> float:
        started = time.perf_counter()
        for step in steps:
            step([batch])
        synchronize(torch.device(device))
        return time.perf_counter() - started

    return timed


if __name__ == "__main__":
    main()
