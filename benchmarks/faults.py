"""Hostile files through every loader, and kills at any moment: what comes of them, by kind.

    python -m benchmarks.faults --inputs 12000 --kills 50

A *bad* end is a traceback, a hang, memory far beyond the file's size, an answer that is no number,
or a resumed run with other weights and no word. A good one is the right result, or one line that
tells what is wrong. Inputs are valid files changed in one to three ways: a value of their JSON, or
bytes. Everything is drawn from --seed.
"""

import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import click
import torch

from benchmarks.changes import change
from benchmarks.hostile import KINDS, SECONDS, outcome
from benchmarks.results import table, write_result
from vitft.files import read_tensors

MEMORY = 2 * 2**30  # bytes beyond what a process has at its start
SHARES = {"adapters": 0.5, "bases": 0.2, "pictures": 0.15, "run states": 0.08, "summaries": 0.07}


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
        KINDS[kind].make(folder)
        rng = random.Random(f"{seed} {kind} {number}")
        change(rng.choice(sorted(p for p in folder.iterdir() if p.is_file())), rng)
        pipe.send((number, outcome(KINDS[kind].use, folder)))
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


def killed(command: list[str], out: Path, file: str, moments: int, seed: int) -> dict[str, int]:
    """Kill a command at random moments and go on with it; return how often it ended right."""
    vitft = [sys.executable, "-m", "vitft", *command]
    started = time.perf_counter()
    subprocess.run([*vitft, f"--out={out}/whole"], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    rng, ends = random.Random(seed), Counter[str]()
    for i in range(moments):
        place = out / str(i)
        process = subprocess.Popen(
            [*vitft, f"--out={place}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
        again = subprocess.run(
            [*vitft, f"--out={place}", "--resume"], check=False, capture_output=True, text=True
        )
        files = [sorted(p.glob(f"**/{file}")) for p in (out / "whole", place)]
        if again.returncode != 0 or len(files[0]) != len(files[1]):
            ends[f"status {again.returncode}: {again.stderr.strip()[-200:]}"] += 1
            continue
        same = all(starmap(equal, zip(*files, strict=True)))
        hidden = [p for p in place.glob("**/.*") if p.is_file() and p.name != ".lock"]
        ends["other weights" if not same else "files left" if hidden else "right"] += 1
        shutil.rmtree(place)
    return dict(ends)


def equal(one: Path, other: Path) -> bool:
    """Return whether two files hold the same tensors, to the bit."""
    a, b = (read_tensors(path)[0] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kills(n: int, seed: int) -> list[dict[str, Any]]:
    """Kill every command that trains, n times each."""
    out, common = Path(mkdtemp()), ["--data=shapes", "--limit=60", "--batch-size=20", "--epochs=2"]
    common += ["--save-seconds=0.05", "--seed=1"]
    small = ["--dim=16", "--hidden-dim=32", "--n-heads=2", "--n-layers=2"]
    base = out / "pretrain/whole/model.safetensors"
    commands = {
        "pretrain": (["pretrain", *common, *small], "model.safetensors"),
        "finetune": (
            ["finetune", "--adapter=lora", f"--base={base}", *common],
            "adapter_model.safetensors",
        ),
        "sweep": (
            ["sweep", "--adapter=lora", "--rank=1,2", "--lr=1e-3,1e-2", f"--base={base}", *common],
            "adapter_model.safetensors",
        ),
    }
    rows = []
    for name, (command, file) in commands.items():
        (out / name).mkdir()
        ends = killed(command, out / name, file, n, seed)
        rows.append(row(f"kills of {name}", Counter(ends)))
        click.echo(table(rows[-1:], COLUMNS), err=True)
    shutil.rmtree(out)
    return rows


COLUMNS = {"kind": "", **dict.fromkeys(("n", "right", "refused", "bad"), ","), "what": ""}


def row(kind: str, ends: Counter[str]) -> dict[str, Any]:
    """Return a row of the table."""
    good = ends["right"] + ends["refused"]
    bad = {end: n for end, n in ends.most_common() if end not in ("right", "refused")}
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
@click.option("--kills", "n_kills", default=50, show_default=True, help="Of each command.")
@click.option("--only", help="One kind of files.")
@click.option("--seed", default=0, show_default=True)
@click.option("--verbose", is_flag=True, help="Print each bad end.")
def main(inputs: int, n_kills: int, only: str | None, seed: int, verbose: bool) -> None:
    """Try all kinds, print a row for each, and write the result."""
    rows = []
    for kind, share in SHARES.items():
        if only in (None, kind):
            ends = Counter[str]()
            for number, end in outcomes(kind, round(inputs * share), seed):
                ends[end] += 1
                if verbose and end not in ("right", "refused"):
                    click.echo(f"{kind} {number}: {end}", err=True)
            rows.append(row(kind, ends))
            click.echo(table(rows[-1:], COLUMNS), err=True)
    if n_kills:
        rows += kills(n_kills, seed)
    if only is None:
        write_result("faults_cpu", rows, inputs=inputs, kills=n_kills, seed=seed)
    click.echo(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
