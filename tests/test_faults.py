"""Hostile files, kills and mishaps: a few of what `benchmarks.faults` tries by thousands."""

import importlib
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.changes import change
from benchmarks.hostile import KINDS, outcome
from benchmarks.jobs import TRAIN, Job
from benchmarks.kills import KILLS
from benchmarks.mishaps import MISHAPS
from tests.shared import ALL

N = {"adapters": 60, "bases": 40, "pictures": 60, "run states": 10, "summaries": 10}
N |= {"other libraries' bases": 16}
SHARE = 1 if ALL else 2  # of them for the whole suite


@pytest.mark.filterwarnings("ignore")  # what a decoder thinks of a broken file
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_end_right_or_in_one_line(kind: str, tmp_path: Path) -> None:
    for number in range(N[kind] // SHARE):
        folder = tmp_path / str(number)
        folder.mkdir()
        KINDS[kind].make(folder)
        rng = random.Random(f"test {kind} {number}")
        change(rng.choice(sorted(path for path in folder.iterdir() if path.is_file())), rng)
        found = outcome(KINDS[kind].use, folder)
        assert found in ("right", "refused"), f"{kind} {number}: {found}"
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def jobs(base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Return a command that is given again, and one that goes on, each done once."""
    importlib.import_module("matplotlib.pyplot")  # once, not in every process forked from here
    place, given = tmp_path_factory.mktemp("jobs"), [f"--base={base}", f"--data={folder}"]
    train = ["finetune", "--adapter=linear", *given, *TRAIN, "--epochs=1", "--limit=16"]
    made = {
        "convert": Job(["convert", base], "base.safetensors"),
        "finetune": Job(train, "run", "--resume"),
    }
    for name, job in made.items():
        job.measure(place / name)
    return made


FAULTS = [
    ("convert", "killed at events", 3),
    ("convert", "SIGTERM at events", 1),
    ("convert", "disk full at events", 3),
    ("convert", "nothing can be written", 3),
    ("convert", "two at once", 1),
    ("finetune", "killed at events", 1),
    ("finetune", "disk full at events", 1),
]


@pytest.mark.parametrize(("name", "what", "n"), FAULTS)
def test_a_command_leaves_all_or_nothing_whatever_happens_to_it(
    jobs: dict[str, Job], name: str, what: str, n: int, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    ends = [*(KILLS | MISHAPS)[what](jobs[name], tmp_path, n, random.Random(0))]
    assert len(ends) == n
    assert {*ends} <= {"right", "refused"}
