"""Hostile files through every loader, kills at any moment, mishaps: what comes of them, by kind.

    python -m benchmarks.faults --inputs 12000 --kills 50

A *bad* end is a traceback, a hang, memory far beyond the file's size, an answer that is no number,
or a resumed run with other weights and no word. A good one is the right result, or one line that
tells what is wrong. Inputs are valid files changed in one to three ways: a value of their JSON, or
bytes. A command that was killed, or to which something happened, is given again and must leave
what the undisturbed one left, and nothing temporary. Everything is drawn from --seed.
"""

import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import click
import torch

from benchmarks.callers import REQUESTS
from benchmarks.changes import change
from benchmarks.hostile import KINDS, SECONDS, outcome
from benchmarks.jobs import jobs, ready
from benchmarks.kills import KILLS, serve_kills
from benchmarks.mishaps import MISHAPS, readers
from benchmarks.results import table, write_result

MEMORY = 2 * 2**30  # bytes beyond what a process has at its start
GOOD = ("right", "refused")
ALL = KINDS | {"requests": REQUESTS}
SHARES = {"adapters": 0.4, "bases": 0.15, "other libraries' bases": 0.1, "pictures": 0.15}
SHARES |= {"run states": 0.08, "summaries": 0.06, "requests": 0.06}


def work(kind: str, numbers: list[int], seed: int, pipe: Any) -> None:
    """Try inputs in a process of its own, which may die of one."""
    torch.set_num_threads(1)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + 8 * 2**30,) * 2)
    sys.stderr = StringIO()
    for number in numbers:
        pipe.send((number, None))
        folder = Path(mkdtemp()) / str(number)
        folder.mkdir()
        ALL[kind].make(folder)
        rng = random.Random(f"{seed} {kind} {number}")
        change(rng.choice(sorted(p for p in folder.iterdir() if p.is_file())), rng)
        pipe.send((number, outcome(ALL[kind].use, folder)))
        shutil.rmtree(folder.parent)
    pipe.send((None, None))


def outcomes(kind: str, n: int, seed: int) -> Iterator[tuple[int, str]]:
    """Yield how each of n inputs of a kind ends."""
    left, context = [*range(n)], get_context("fork")
    while left:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(kind, left, seed, theirs))
        process.start()
        theirs.close()
        current = left[0]
        while True:
            if not ours.poll(3 * SECONDS):
                process.kill()
                yield current, "hang"
                left = [i for i in left if i > current]
                break
            try:
                number, found = ours.recv()
            except EOFError:
                yield current, "died"
                left = [i for i in left if i > current]
                break
            if number is None:
                left = []
                break
            current = number
            if found is not None:
                yield number, found
        process.join()


def timely(ends: Iterable[str], seconds: float) -> Counter[str]:
    """Count ends, for so many seconds at most."""
    started, found = time.perf_counter(), Counter[str]()
    for end in ends:
        found[end] += 1
        if time.perf_counter() - started > seconds:
            break
    return found


def befallen(n: int, seconds: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to end a command, and for each mishap, n of every command."""
    rng = random.Random(seed)
    ready()
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # for one that may write nowhere
        commands = jobs(folder)
        for what, trial in KILLS.items():
            for command, job in commands.items():
                times = job.n_events if what == "killed at events" else n  # at each of them
                yield row(f"{command}, {what}", Counter(trial(job, folder, times, rng)))
        yield row("serve, killed as it loads", Counter(serve_kills(commands, folder, n, rng)))
        for what, trial in MISHAPS.items():
            ends = Counter[str]()
            for command, job in commands.items():
                for end, times in timely(trial(job, folder, n, rng), seconds).items():
                    ends[end if end in GOOD else f"{command}: {end}"] += times
            yield row(what, ends)
        yield row("eight readers of what is written", readers(commands, folder, n))


COLUMNS = {"kind": "", **dict.fromkeys(("n", "right", "refused", "bad"), ","), "what": ""}


def row(kind: str, ends: Counter[str]) -> dict[str, Any]:
    """Return a row of the table."""
    good = sum(ends[end] for end in GOOD)
    bad = {end: n for end, n in ends.most_common() if end not in GOOD}
    return {
        "kind": kind,
        "n": ends.total(),
        "right": ends["right"],
        "refused": ends["refused"],
        "bad": ends.total() - good,
        "what": "; ".join(f"{n} {end}" for end, n in [*bad.items()][:6]),
        "ends": dict(ends),
    }


@click.command()
@click.option("--inputs", default=12_000, show_default=True, help="Hostile files in all.")
@click.option("--kills", "n_kills", default=50, show_default=True, help="And mishaps of a command.")
@click.option("--seconds", default=60, show_default=True, help="Most for a mishap to a command.")
@click.option("--only", help="One kind of files.")
@click.option("--seed", default=0, show_default=True)
@click.option("--verbose", is_flag=True, help="Print each bad end.")
def main(
    inputs: int, n_kills: int, seconds: int, only: str | None, seed: int, verbose: bool
) -> None:
    """Try all kinds, print a row for each, and write the results."""
    rows: list[dict[str, Any]] = []
    for kind, share in SHARES.items():
        if inputs and only in (None, kind):
            ends = Counter[str]()
            for number, end in outcomes(kind, round(inputs * share), seed):
                ends[end] += 1
                if verbose and end not in GOOD:
                    click.echo(f"{kind} {number}: {end}", err=True)
            rows.append(row(kind, ends))
            click.echo(table(rows[-1:], COLUMNS), err=True)
    if rows and only is None:
        write_result("faults_cpu", rows, inputs=inputs, seed=seed)
    if n_kills and only is None:
        kills = []
        for found in befallen(n_kills, seconds, seed):
            kills.append(found)
            click.echo(table(kills[-1:], COLUMNS), err=True)
        write_result("kills_cpu", kills, kills=n_kills, seconds=seconds, seed=seed)
        rows += kills
    click.echo(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
