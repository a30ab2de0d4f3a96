"""Requests a second and how long they take, by the number of adapters and of clients.

    python -m benchmarks.serve --base cifar10 --adapters 1,8,64 --clients 1,8,32

Each client asks one adapter about one picture (PNG, in memory) again and again, over HTTP on this
machine.
Beside it stand two ways without a bank: the same, but each pass takes one adapter's pictures only;
and a process for each adapter, up to --processes.
"""

import io
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
import psutil
import torch
import uvicorn
from PIL import Image

import adapters
from benchmarks.results import table, write_result
from recipes.serving.app import Limits, make_app
from recipes.serving.desk import Desk
from recipes.serving.jobs import Job
from vitft import load_model

COLUMNS = {"way": "", "adapters": "", "clients": "", "per_second": ",.0f"}
COLUMNS |= {"p50_ms": ",.1f", "p99_ms": ",.1f", "megabytes": ",.0f"}


class OneByOne(Desk):
    """A desk that answers one adapter's pictures a pass, as a model for each adapter would."""

    def _answer(self, jobs: Sequence[Job]) -> None:
        by_slot: dict[int, list[Job]] = {}
        for job in jobs:
            by_slot.setdefault(job.slots[0], []).append(job)
        for same in by_slot.values():
            super()._answer(same)


def saved(base: str, n: int, folder: Path) -> dict[str, str]:
    """Return the folders of n adapters, of random numbers, by name."""
    found = {}
    for i in range(n):
        model = load_model(base)
        model.new_head(tuple("abcdefghij"))
        adapters.inject(model, adapters.LoRAConfig(rank=8), trainable=("head",))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.02)
        found[f"a{i}"] = str(folder / f"a{i}")
        adapters.save_adapter(model, found[f"a{i}"])
    return found


def serve(kind: type[Desk], base: str, folders: dict[str, str], port: int, n_threads: int) -> None:
    """Serve adapters from this process, until it is ended."""
    torch.set_num_threads(n_threads)
    desk = kind(load_model(base), folders, device=torch.device("cpu"), max_adapters=len(folders))
    app = make_app(desk, Limits(), token=None, hosts=["*"])
    uvicorn.run(app, port=port, log_level="error")


@contextmanager
def served(
    kind: type[Desk], base: str, parts: Sequence[dict[str, str]], port: int
) -> Iterator[tuple[dict[str, str], float]]:
    """Serve each part from a process of its own; give every adapter's address, and all megabytes.

    The processes share two threads' worth of computing: several have one each.
    """
    context = get_context("spawn")
    n_threads = 1 if len(parts) > 1 else torch.get_num_threads()
    processes, addresses = [], {}
    for i, folders in enumerate(parts):
        arguments = (kind, base, folders, port + i, n_threads)
        processes.append(context.Process(target=serve, args=arguments))
        addresses |= dict.fromkeys(folders, f"http://127.0.0.1:{port + i}")
    try:
        for process in processes:
            process.start()
        for address in addresses.values():
            wait_for(address)
        infos = [psutil.Process(process.pid).memory_full_info() for process in processes]
        yield addresses, sum(info.pss for info in infos) / 1e6
    finally:
        for process in processes:
            process.terminate()
            process.join()


def wait_for(address: str) -> None:
    """Wait until a server answers, for two minutes at most."""
    for _ in range(1200):
        try:
            httpx.get(f"{address}/adapters").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError(f"no server answers at {address}")


def measured(addresses: dict[str, str], n_clients: int, seconds: float) -> dict[str, float]:
    """Return requests a second, and their milliseconds; every adapter is asked as often."""
    names = [*addresses]
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(content, "PNG")
    ends = time.perf_counter() + seconds

    def ask(number: int) -> list[float]:
        times = []
        with httpx.Client(timeout=60) as client:
            while (started := time.perf_counter()) < ends:
                name = names[(number + len(times)) % len(names)]
                sent = client.post(
                    f"{addresses[name]}/predict",
                    files=[("files", ("x.png", content.getvalue()))],
                    data={"adapters": name},
                )
                sent.raise_for_status()
                times.append(1000 * (time.perf_counter() - started))
        return times

    with ThreadPoolExecutor(n_clients) as pool:
        times = sorted(t for found in pool.map(ask, range(n_clients)) for t in found)
    return {
        "per_second": len(times) / seconds,
        "p50_ms": statistics.median(times),
        "p99_ms": times[int(0.99 * (len(times) - 1))],
    }


@click.command()
@click.option("--base", default="cifar10", show_default=True)
@click.option("--adapters", "numbers", default="1,8,64", show_default=True)
@click.option("--clients", default="1,8,32", show_default=True)
@click.option("--processes", default=8, show_default=True, help="At most, one an adapter.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each.")
@click.option("--port", default=8199, show_default=True)
def main(base: str, numbers: str, clients: str, processes: int, seconds: float, port: int) -> None:
    """Measure all ways with every number of adapters and clients, and print a table."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        most = max(map(int, numbers.split(",")))
        folders = saved(base, most, Path(folder))
        for n in map(int, numbers.split(",")):
            some = dict([*folders.items()][:n])
            apart = [{name: place} for name, place in some.items()]
            ways: dict[str, tuple[type[Desk], list[dict[str, str]]]] = {
                "one pass": (Desk, [some]),
                "a pass an adapter": (OneByOne, [some]),
                **({"a process an adapter": (Desk, apart)} if 1 < n <= processes else {}),
            }
            for way, (kind, parts) in ways.items():
                with served(kind, base, parts, port) as (addresses, megabytes):
                    measured(addresses, 2, 1.0)
                    for c in map(int, clients.split(",")):
                        found = {"way": way, "adapters": n, "clients": c, "megabytes": megabytes}
                        rows.append(found | measured(addresses, c, seconds))
                        click.echo(table(rows[-1:], COLUMNS), err=True)
    write_result("serve_cpu", rows, base=base, seconds=seconds)
    click.echo(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
