"""Images a second of `vitft pretrain`'s loop, and the article's own beside it, in one run.

    python -m benchmarks.throughput --data data/cifar10

vitft's rows train the article's sizes on random images held on the device; flips, crops, clipping
and the optimizer are in the time, validation is not. MFU is the share of what the largest matrix
product here reaches: 3 forward passes of exact operation counts, by that product's speed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.results import table, write_result
from vitft import VisionTransformer, ViTConfig
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run

COLUMNS = {"loop": "", "batch_size": "", "images_per_second": ",.0f", "mfu": ".1%"}


def forward_flop(config: ViTConfig) -> int:
    """Return the operations of a forward pass on one image, a multiplication and an addition: 2."""
    n, d = config.n_patches + (config.pooling == "cls"), config.dim

    def block(n_out: int) -> int:  # keys and values of every token, the rest of n_out
        return 2 * n * d * d + n_out * (2 * d * d + 2 * d * config.hidden_dim + 2 * n * d)

    patches = config.n_patches * config.n_channels * config.patch_size**2 * d
    last = block(1 if config.pooling == "cls" else n)
    return 2 * (patches + (config.n_layers - 1) * block(n) + last + d * config.n_classes)


def peak_flops(device: str, bf16: bool) -> float:
    """Return the operations a second of the fastest large matrix product."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def vitft(
    batch_size: int, n_images: int, *, device: str, bf16: bool, compiled: bool, pooling: str
) -> float:
    """Return the images a second of the last of three epochs."""
    pixels = torch.randint(0, 256, (n_images, 3, 32, 32), dtype=torch.uint8)
    images = Images(lambda i: pixels[i], torch.arange(n_images) % 10).to(torch.device(device))
    model = VisionTransformer(ViTConfig(dropout=0.0, pooling=pooling)).to(device)
    plan = Plan(
        epochs=3,
        batch_size=batch_size,
        lr=1e-4,
        weight_decay=0.05,
        bf16=bf16,
        compiled=compiled,
        recorded=device == "cuda",
        augmentation=Augmentation(flip=True, shift=4),
        save_seconds=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        none = images.subset(torch.arange(0))
        train(run := Run(model, images, none, plan, Path(folder)))
    return float(run.history[-1]["images_per_second"])


def check_recorded() -> float:
    """Return how far recorded steps go from the same steps as written, relative to their way."""
    pixels = torch.randint(0, 256, (640, 3, 32, 32), dtype=torch.uint8)
    weights = []
    for recorded in (False, True):
        torch.manual_seed(0)
        images = Images(lambda i: pixels[i], torch.arange(640) % 10).to(torch.device("cuda"))
        model = VisionTransformer(ViTConfig(dropout=0.0)).to("cuda")
        start = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        same: dict[str, Any] = {"epochs": 4, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05}
        plan = Plan(**same, optimizer="muon", recorded=recorded, save_seconds=0)
        with tempfile.TemporaryDirectory() as folder:
            train(Run(model, images, images.subset(torch.arange(0)), plan, Path(folder)))
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    return float((weights[1] - weights[0]).norm() / (weights[0] - start).norm())


def article(data: str, batch_size: int, seconds: float, device: str) -> float:
    """Return the images a second of the article's own loop."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "article.json")
        command = [sys.executable, "-m", "benchmarks.article", data, f"--seconds={seconds}"]
        command += [f"--batch-size={batch_size}", f"--device={device}", f"--json={file}"]
        subprocess.run([*command, "--test-limit=100"], check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(file.read_text())["images_per_second"])


@click.command()
@click.option("--data", required=True, help="Folder of images for the article's loop.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--n-images", default=50_000, show_default=True, help="In an epoch of vitft's.")
@click.option("--seconds", default=20.0, show_default=True, help="Of the article's loop.")
@click.option("--batch-sizes", default="128,512,1024", show_default=True)
def main(data: str, device: str, n_images: int, seconds: float, batch_sizes: str) -> None:
    """Measure and print a table."""
    gpu = device == "cuda"
    peak = peak_flops(device, bf16=gpu)
    rows: list[dict[str, Any]] = [
        {
            "loop": "article",
            "batch_size": 16,
            "images_per_second": article(data, 16, seconds, device),
        }
    ]
    for pooling in ("cls", "mean"):
        flop = 3 * forward_flop(ViTConfig(pooling=pooling))
        for compiled in (False, True) if gpu else (False,):
            for size in map(int, batch_sizes.split(",")):
                speed = vitft(
                    size, n_images, device=device, bf16=gpu, compiled=compiled, pooling=pooling
                )
                loop = f"vitft, {pooling}, {'compiled' if compiled else 'eager'}"
                rows.append({"loop": loop, "batch_size": size, "images_per_second": speed})
                rows[-1]["mfu"] = speed * flop / peak
                click.echo(table(rows[-1:], COLUMNS), err=True)
    facts = {"recorded_differs_by": check_recorded()} if gpu else {}
    path = write_result(f"throughput_{device}", rows, peak_flops=peak, bf16=gpu, **facts)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
