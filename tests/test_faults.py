"""Hostile files end right or in one line: a few of what `benchmarks.faults` tries by thousands."""

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.changes import change
from benchmarks.hostile import KINDS, outcome

N = {"adapters": 60, "bases": 40, "pictures": 60, "run states": 10, "summaries": 10}


@pytest.mark.filterwarnings("ignore")  # what a decoder thinks of a broken file
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_end_right_or_in_one_line(kind: str, tmp_path: Path) -> None:
    for number in range(N[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        KINDS[kind].make(folder)
        rng = random.Random(f"test {kind} {number}")
        change(rng.choice(sorted(path for path in folder.iterdir() if path.is_file())), rng)
        found = outcome(KINDS[kind].use, folder)
        assert found in ("right", "refused"), f"{kind} {number}: {found}"
        shutil.rmtree(folder)
