"""What several processes cost and give: bytes a step, the time to add them up, and steps by number.

    python -m benchmarks.processes --base data/vits14-saliency --image-size 112 --processes 2

Measured: a step of one process with all cores' share of one, the bytes of its gradients, and how
long gloo takes to add up that many among the processes of this machine. The table of many machines
is computed from the step and the bytes: the batch of each process stays the same, and a ring of N
moves 2 (N - 1) / N times the bytes through each link. Gradients are taken to wait for the whole
backward pass, though DDP sends them while it runs.
"""

import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import torch.distributed as dist

import adapters
from benchmarks.results import table, write_result
from vitft import load_model
from vitft.pictures.images import Images
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step

LINKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "100 Gbit/s": 1e11 / 8}  # bytes a second
NUMBERS = (1, 2, 4, 8, 16, 64)
MEASURED = {
    "method": "",
    "gradient_bytes": ",",
    "step_ms": ",.0f",
    "add_up_ms": ",.1f",
    "shared_step_ms": ",.0f",
}
CPU = torch.device("cpu")


def new_run(base: str, method: str, image_size: int, batch_size: int, folder: Path) -> Run:
    """Return a run of a method on noise."""
    torch.manual_seed(0)
    model = load_model(base)
    model.resize(image_size)
    model.new_head(tuple(str(i) for i in range(10)))
    if method != "full":
        adapters.inject(model, adapters.METHODS[method](), trainable=("head",))
    pixels = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    images = Images(pixels.__getitem__, torch.arange(batch_size) % 10).to(CPU)
    plan = Plan(epochs=1, batch_size=batch_size, lr=1e-4, weight_decay=0.0)
    return Run(model, images, images, plan, folder)


def step_ms(run: Run, rounds: int) -> float:
    """Return the median of a step's milliseconds."""
    step, times = Step([run], lambda models: models[0]), []
    shares = run.shares()
    (batch,) = run.batches(shares)
    for _ in range(rounds + 1):
        started = time.perf_counter()
        step([batch], shares[0])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def measure(rank: int, n: int, options: dict[str, Any], folder: str) -> None:
    """Measure, as one of n processes; the first one writes what it found."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    rows = []
    for method in options["methods"]:
        size, batch = options["image_size"], options["batch_size"]
        run = new_run(options["base"], method, size, batch, Path(folder))
        alone = step_ms(run, options["rounds"])
        rows.append(
            {
                "method": method,
                "gradient_bytes": sum(4 * p.numel() for p in run.trainable.values()),
                "step_ms": alone,
            }
        )
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    for row in rows:
        gradient, times = torch.ones(row["gradient_bytes"] // 4), []
        for _ in range(options["rounds"] + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(gradient)
            times.append(1000 * (time.perf_counter() - started))
        row["add_up_ms"] = statistics.median(times[1:])
        run = new_run(options["base"], row["method"], size, batch * n, Path(folder))
        row["shared_step_ms"] = step_ms(run, options["rounds"])  # of n batches
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def simulated(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how many times faster than one process N are, by the speed of their links."""
    found = []
    for n in NUMBERS:
        speeds: dict[str, Any] = {"method": row["method"], "n": n}
        for link, rate in LINKS.items():
            moved = 2 * (n - 1) / n * row["gradient_bytes"] / rate
            speeds[link] = n * row["step_ms"] / (row["step_ms"] + 1000 * moved)
        found.append(speeds)
    return found


@click.command()
@click.option("--base", required=True, help="As in vitft finetune.")
@click.option("--methods", default="lora,full", show_default=True, help="With commas.")
@click.option("--image-size", default=112, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Images of each process.")
@click.option("--processes", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(
    base: str, methods: str, image_size: int, batch_size: int, processes: int, rounds: int
) -> None:
    """Measure on this machine, compute for others, and print both."""
    options = {"base": base, "methods": methods.split(","), "image_size": image_size}
    options |= {"batch_size": batch_size, "rounds": rounds}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (processes, options, folder), nprocs=processes)
        rows = json.loads(Path(folder, "rows.json").read_text())
    computed = [row for measured in rows for row in simulated(measured)]
    write_result("processes_cpu", rows, computed=computed, processes=processes, **options)
    click.echo(table(rows, MEASURED))
    click.echo(table(computed, {"method": "", "n": "", **dict.fromkeys(LINKS, ".1f")}))


if __name__ == "__main__":
    main()
