"""A mixed batch through a bank, in turn with one adapter alone and with switching between adapters.

    python -m benchmarks.bank

For each number of adapters in a batch of 256, milliseconds of: the batch by one adapter alone;
the mixed batch by the bank; and every adapter's rows by the base with that adapter loaded. On a CPU
each is computed in parts, side by side on the cores, as by `vitft evaluate` and `vitft predict`.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import adapters
from benchmarks.results import medians, table, write_result
from vitft import load_model
from vitft.devices.cores import in_parts

COLUMNS = {
    "adapters": "",
    "alone": ".0f",
    "bank": ".0f",
    "switching": ".0f",
    "bank of alone": ".2f",
    "bank of switching": ".2f",
}


@click.command()
@click.option("--base", default="cifar10", show_default=True, help="As in vitft evaluate.")
@click.option("--method", default="lora", show_default=True)
@click.option("--targets", default=None, help="Names of modules; by default the method's.")
@click.option("--adapters", "counts", default="1,8,64", show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    base: str,
    method: str,
    targets: str | None,
    counts: str,
    batch_size: int,
    rounds: int,
    device: str,
) -> None:
    """Time the three ways in turn and print the medians."""
    rows = []
    for n in map(int, counts.split(",")):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            folders = [
                make_adapter(base, method, targets, Path(folder, str(i)), i) for i in range(n)
            ]
            times = measure(base, folders, batch_size, rounds, device)
        rows.append(
            {"adapters": n}
            | {name: 1000 * seconds for name, seconds in times.items()}
            | {f"bank of {name}": times["bank"] / times[name] for name in ("alone", "switching")}
        )
        click.echo(table(rows[-1:], COLUMNS), err=True)
    name = f"bank_{device}" if method == "lora" else f"bank_{method}_{device}"
    how = {"batch_size": batch_size, "rounds": rounds, "method": method, "targets": targets}
    path = write_result(name, rows, **how)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


def measure(
    base: str, folders: list[Path], batch_size: int, rounds: int, device: str
) -> dict[str, float]:
    """Return the median seconds of each way, once all give the same logits."""
    n = len(folders)
    bank = adapters.Bank(load_model(base), folders).to(device)
    alone = [adapters.load_adapter(load_model(base), folder).to(device) for folder in folders]
    config = alone[0].config
    shape = (batch_size, config.n_channels, config.image_size, config.image_size)
    images, ids = torch.randn(shape, device=device), torch.arange(batch_size, device=device) % n
    parts = [images[ids == i] for i in range(n)]

    def answer(model: nn.Module, *batch: Tensor) -> Tensor:
        def part(*some: Tensor) -> Tensor:
            with torch.inference_mode():
                return model(*some)

        return in_parts(part, *batch)

    def switching() -> list[Tensor]:
        return [answer(model, part) for model, part in zip(alone, parts, strict=True)]

    found = answer(bank, images, ids + 1)
    for i, rows in enumerate(switching()):
        torch.testing.assert_close(found[ids == i], rows, rtol=0, atol=1e-3)
    ways: dict[str, Callable[[], object]] = {
        "alone": lambda: answer(alone[0], images),
        "bank": lambda: answer(bank, images, ids + 1),
        "switching": switching,
    }
    return medians({name: timer(way, device) for name, way in ways.items()}, rounds)


def make_adapter(base: str, method: str, targets: str | None, folder: Path, seed: int) -> Path:
    """Save an adapter with random numbers to `folder`."""
    torch.manual_seed(seed)
    methods: dict[str, Callable[..., adapters.AdapterConfig]] = {**adapters.METHODS}
    config = methods[method](**({"targets": tuple(targets.split(","))} if targets else {}))
    model = adapters.inject(load_model(base), config, trainable=("head",))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    adapters.save_adapter(model, folder)
    return folder


def timer(way: Callable[[], object], device: str) -> Callable[[], float]:
    """Return a function that tells how many seconds `way` takes."""

    def timed() -> float:
        started = time.perf_counter()
        way()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return timed


if __name__ == "__main__":
    main()
