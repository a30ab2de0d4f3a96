"""Commands killed at any moment and at every file-system event; a server killed while it loads."""

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.jobs import Job, place_in
from benchmarks.trouble import SECONDS, Act, Command, Events, die, stop

Trial = Callable[[Job, Path, int, random.Random], Iterator[str]]


def at_events(
    job: Job,
    folder: Path,
    n: int,
    rng: random.Random,
    *,
    act: Callable[[Job, Path], Act],
    on: bool = False,
) -> Iterator[str]:
    """Let something happen at each event of a job, or at n of them; yield how it ends.

    Args:
        act: tells for a job and its place what happens.
        on: whether it happens at every later event, too.
    """
    for number in rng.sample(range(1, job.n_events + 1), min(n, job.n_events)):
        with place_in(folder) as place:
            events = Events(place, act(job, place), number, on)
            yield job.verdict(place, job.begin(place, events.watch).end())


def at_moments(job: Job, folder: Path, n: int, rng: random.Random) -> Iterator[str]:
    """Kill a job at n random moments; yield how it ends."""
    for _ in range(n):
        with place_in(folder) as place:
            ended = job.begin(place).end(rng.uniform(0, job.seconds), kill=True)
            yield job.verdict(place, ended)


KILLS: dict[str, Trial] = {
    "killed at moments": at_moments,
    "killed at events": partial(at_events, act=lambda job, place: die),
    "SIGTERM at events": partial(at_events, act=lambda job, place: stop),
}


def serve_kills(jobs: dict[str, Job], folder: Path, n: int, rng: random.Random) -> Iterator[str]:
    """Kill a server n times while it loads an adapter or replaces one; yield how it ends.

    The next one must answer as the first did, and the folders must stay as they are.
    """
    sweep, base = (jobs["sweep"].whole, jobs["pretrain"].whole)
    folders = [path.parent for path in sorted(sweep.rglob("adapter_config.json"))]
    picture = next(folder.glob("pictures/test/*/0.png")).read_bytes()
    expected, before = None, contents(sweep)
    for _ in range(n + 1):
        port = free_port()
        options = [f"--base={base}/run", f"--adapter=a={folders[0]}", f"--port={port}"]
        server, address = Command(["serve", *options]), f"http://127.0.0.1:{port}"
        try:
            answer = asked(address, picture)
            expected = expected or answer
            moment = time.perf_counter() + rng.uniform(0, 0.3)
            while time.perf_counter() < moment:
                at = f"{address}/adapters/{rng.choice('ab')}"
                httpx.put(at, json={"folder": str(rng.choice(folders))}).raise_for_status()
                with suppress(httpx.TimeoutException):  # killed in the middle of it
                    left = max(0.001, moment - time.perf_counter())
                    httpx.put(at, json={"folder": str(rng.choice(folders))}, timeout=left)
            found = "right" if answer == expected else "other answers"
        except httpx.HTTPError as error:
            found = f"{type(error).__name__}: {str(error)[:100]}"
        ended = server.end(0, kill=True)
        same = contents(sweep) == before
        yield ended.fault or (found if same else "folders changed")


def asked(address: str, picture: bytes) -> Any:
    """Return a server's answer to a picture, once it listens."""
    for _ in range(20 * SECONDS):
        with suppress(httpx.ConnectError):
            files = {"files": ("a.png", picture)}
            return httpx.post(f"{address}/predict", files=files, timeout=SECONDS).json()
        time.sleep(0.05)
    raise httpx.ConnectError("the server does not start")


def free_port() -> int:
    """Return the number of a port at which nobody listens."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
