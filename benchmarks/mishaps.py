"""What befalls commands from outside: full disks, lost folders, clocks, others at one place."""

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import adapters
from benchmarks.hostile import outcome
from benchmarks.jobs import Job, place_in
from benchmarks.kills import Trial, at_events
from benchmarks.trouble import Act, Ended, full, lose, nothing
from recipes.inspect import inspect
from recipes.shared.model import open_model
from vitft.model.checkpoint import load_model

NOBODY = 65534  # a user's number
READERS = 8
PLACES = ("below what is read-only", "in a read-only folder", "below a file", "a file")


def small_disk(job: Job, folder: Path, n: int, rng: random.Random) -> Iterator[str]:
    """Do a job on a disk too small for it, n times; later there is room. Needs to be root."""
    need = sum(path.stat().st_size for path in job.whole.rglob("*") if path.is_file())
    for _ in range(n if os.geteuid() == 0 else 0):
        with place_in(folder) as place, mounted(place, rng.randrange(need)):
            ended = job.begin(place).end()
            _mount(place, "remount,size=1g")
            yield job.verdict(place, ended)


@contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """Let a place be a disk of a size in bytes."""
    _mount(place, f"size={max(1, size)}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)


def lost(job: Job, place: Path) -> Act:
    """Return what loses the folder that a job writes to."""
    act = lose(place / job.out if job.again else place)
    # a lock goes when all is done
    return lambda event, file: None if str(file).endswith(".lock") else act(event, file)


def no_right(job: Job, folder: Path, n: int, rng: random.Random) -> Iterator[str]:
    """Do a job where nothing can be written: it is refused, and what is there stays."""
    for kind in PLACES[:n]:
        with place_in(folder) as place:
            place.chmod(0o755)
            if kind == PLACES[1]:
                (place / job.out).mkdir(0o555)
            elif kind == PLACES[2]:
                (place / "file").touch()
                place = place / "file"
            elif kind == PLACES[3]:
                (place / job.out).touch()
            ended = job.begin(place, become_nobody).end()
            yield ended.fault or ("refused" if ended.status == 2 else f"{kind}: done")


def become_nobody() -> None:
    """Give up the rights of root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def set_back(event: str, file: object) -> None:
    """Set this process's clock back by a day."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - 86_400
    time.time_ns = lambda: now_ns() - 86_400 * 10**9


def two_at_once(job: Job, folder: Path, n: int, rng: random.Random) -> Iterator[str]:
    """Start a job twice in one place, n times, the second one at a random moment."""
    for _ in range(n):
        with place_in(folder) as place:
            more = ["--overwrite"] * bool(job.again and rng.random() < 0.5)
            first = job.begin(place, nothing, *more)
            time.sleep(rng.uniform(0, job.seconds) * rng.choice((0.01, 1)))
            both = [job.begin(place, nothing, *more).end(), first.end()]
            yield _verdict_of_both(job, place, both)


def _verdict_of_both(job: Job, place: Path, both: list[Ended]) -> str:
    for ended in both:
        if ended.fault or ended.status not in (0, 2):
            return ended.fault or f"status {ended.status}"
    done = [ended for ended in both if ended.status == 0]
    return job.verdict(place, done[0]) if done else "neither is done"


def readers(jobs: dict[str, Job], folder: Path, n: int) -> Counter[str]:
    """Let eight processes read an adapter n times each while another one saves it over and over.

    Right is an answer of one of those that were saved.
    """
    base = jobs["pretrain"].whole / "run/model.safetensors"
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [_adapted(base, rank, seed) for rank, seed in ((1, 0), (2, 1), (2, 2))]
    with torch.no_grad():
        answers = [model.eval()(images) for model in models]

    def write(place: Path) -> None:
        while True:
            adapters.save_adapter(random.choice(models), place)

    def read(place: Path) -> str:
        if random.random() < 0.5:
            found = inspect(str(place))
            ranks = {shape[0] for name, shape in found["tensors"].items() if "lora_A" in name}
            return "" if ranks == {found["config"]["r"]} else "ranks of two"
        with torch.no_grad():
            answer = open_model(str(base), str(place))(images)
        return "" if any(torch.equal(answer, known) for known in answers) else "other answers"

    with place_in(folder) as place:
        adapters.save_adapter(models[0], place)
        writer = get_context("fork").Process(target=write, args=(place,), daemon=True)
        writer.start()
        found = _each(lambda: Counter(outcome(read, place) for _ in range(n)))
        writer.kill()
        writer.join()
    return found


def _adapted(base: Path, rank: int, seed: int) -> torch.nn.Module:
    model = load_model(base)
    adapters.inject(model, adapters.LoRAConfig(rank=rank), trainable=("head",))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def _each(work: Callable[[], Counter[str]]) -> Counter[str]:
    """Return what eight processes count together."""
    context, total = get_context("fork"), Counter[str]()
    results = context.SimpleQueue()
    processes = [context.Process(target=lambda: results.put(work())) for _ in range(READERS)]
    for process in processes:
        process.start()
    for _ in processes:
        total += results.get()
    for process in processes:
        process.join()
    return total


MISHAPS: dict[str, Trial] = {
    "disk full at events": partial(at_events, act=lambda job, place: full, on=True),
    "disk too small": small_disk,
    "folder lost at events": partial(at_events, act=lost),
    "clock set back at events": partial(at_events, act=lambda job, place: set_back),
    "nothing can be written": no_right,
    "two at once": two_at_once,
}
