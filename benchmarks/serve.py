"""Requests a second and how long they take, by the number of adapters and of clients.

    python -m benchmarks.serve --base cifar10 --adapters 1,8,64 --clients 1,8,32

Each client asks one adapter about one picture (PNG, in memory) again and again, over HTTP on this
machine.
Beside it stands the way without a bank: the same, but each pass takes one adapter's pictures only.
"""

import io
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx
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
COLUMNS |= {"p50_ms": ",.1f", "p99_ms": ",.1f"}


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


@contextmanager
def served(desk: Desk, port: int) -> Iterator[str]:
    """Serve a desk; give its address."""
    app = make_app(desk, Limits(), token=None, hosts=["*"])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        desk.close()


def measured(url: str, n_adapters: int, n_clients: int, seconds: float) -> dict[str, float]:
    """Return requests a second, and their milliseconds."""
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(content, "PNG")
    ends = time.perf_counter() + seconds

    def ask(number: int) -> list[float]:
        times = []
        with httpx.Client(timeout=60) as client:
            while (started := time.perf_counter()) < ends:
                name = f"a{(number + len(times)) % n_adapters}"
                sent = client.post(
                    f"{url}/predict",
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
@click.option("--seconds", default=8.0, show_default=True, help="Of each.")
@click.option("--port", default=8199, show_default=True)
def main(base: str, numbers: str, clients: str, seconds: float, port: int) -> None:
    """Measure both ways with every number of adapters and clients, and print a table."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        most = max(map(int, numbers.split(",")))
        folders = saved(base, most, Path(folder))
        for n in map(int, numbers.split(",")):
            some = dict([*folders.items()][:n])
            for way, kind in {"one pass": Desk, "a pass an adapter": OneByOne}.items():
                desk = kind(load_model(base), some, device=torch.device("cpu"))
                with served(desk, port) as url:
                    measured(url, n, 2, 1.0)
                    for c in map(int, clients.split(",")):
                        found = {"way": way, "adapters": n, "clients": c}
                        rows.append(found | measured(url, n, c, seconds))
                        click.echo(table(rows[-1:], COLUMNS), err=True)
    write_result("serve_cpu", rows, base=base, seconds=seconds)
    click.echo(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
