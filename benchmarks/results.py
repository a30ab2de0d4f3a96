"""Rows of figures in; `benchmarks/results/NAME.json` with where and when they were measured out.

`$VITFT_RESULTS` names another folder.
"""

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitft import __version__
from vitft.devices.graphs import WARM_UP

FOLDER = Path(os.environ.get("VITFT_RESULTS", Path(__file__).parent / "results"))


def write_result(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write the rows with hardware, versions, date and commit, and return the path."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = {
        "rows": rows,
        **facts,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "vitft": __version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def medians(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return each one's median time of `rounds` after some to warm up, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + WARM_UP + 1):
        for name, contestant in contestants.items():
            times[name].append(contestant())
    return {name: statistics.median(values[-rounds:]) for name, values in times.items()}


def run_once(command: list[str], out: Path) -> None:
    """Run a command of vitft that writes `out`, unless the very same one has written it."""
    done = out / "command.json"
    if not done.exists() or json.loads(done.read_text()) != command:
        done.unlink(missing_ok=True)
        vitft = [sys.executable, "-m", "vitft", *command]
        subprocess.run(vitft, check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(command))


def few_tests(data: Path, folder: Path, n: int = 20) -> Path:
    """Return a folder, as links, with the training images of `data` and `n` tests of each class."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "train").symlink_to((data / "train").resolve())
    for path in (data / "test").iterdir():
        (folder / "test" / path.name).mkdir(parents=True)
        for image in sorted(path.resolve().iterdir())[:n]:
            (folder / "test" / path.name / image.name).symlink_to(image)
    return folder


def hardware() -> str:
    """Return the GPU's name, or the CPU's with the number of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return a Markdown table of the rows: columns gives for each key a format such as ".2%"."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [
            format(row[key], form) if row.get(key) is not None else ""
            for key, form in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
