"""This commit's benchmarks in turn with an older one's: `python -m benchmarks.versus_commit OLDER`.

Every round runs each benchmark once in the older tree and once in this one, so that a machine whose
speed drifts treats them alike. The medians of the rounds are compared; only what is timed in both
is. Lower is better in every figure.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.results import table, write_result

HERE = Path(__file__).parents[1]
# benchmark -> its options, what names a row, and what is timed
BENCHMARKS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "lora_step": (["--rounds=3"], ["method"], ["milliseconds"]),
    "bank": (["--rounds=5"], ["adapters"], ["alone", "bank", "switching"]),
    "sweep": (
        ["--rounds=3", "--batch-sizes=16"],
        ["batch_size", "layers"],
        ["together", "one by one"],
    ),
}
# as the older one has it by default, so that both compute the same
THIS = {"bank": ["--targets=wq,wk,wv,wo"]}
COLUMNS = {"benchmark": "", "timed": "", "older": ".4g", "this": ".4g", "this of older": ".2f"}


@click.command()
@click.argument("commit")
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", default=",".join(BENCHMARKS), help="Some of the benchmarks.")
def main(commit: str, rounds: int, only: str) -> None:
    """Run both trees' benchmarks in turn and print the medians."""
    times: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True)
        try:
            for _ in range(rounds):
                for name in only.split(","):
                    for which, where in (("older", tree), ("this", HERE)):
                        for timed, value in measure(name, where, Path(folder)).items():
                            times[name, timed][which].append(value)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    rows: list[dict[str, Any]] = []
    for (name, timed), both in times.items():
        if len(both) == 2:
            middle = {which: statistics.median(values) for which, values in both.items()}
            ratio = {"this of older": middle["this"] / middle["older"]}
            rows.append({"benchmark": name, "timed": timed} | middle | ratio)
    write_result("versus_commit", rows, older=commit, rounds=rounds)
    click.echo(table(rows, COLUMNS))


def measure(name: str, tree: Path, results: Path) -> dict[str, float]:
    """Run a tree's benchmark; return what it timed."""
    options, keys, timed = BENCHMARKS[name]
    before = {*results.glob("*.json")}
    environment = os.environ | {"VITFT_RESULTS": str(results), "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    command += THIS.get(name, []) if tree == HERE else []
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    (path,) = {*results.glob("*.json")} - before
    rows = json.loads(path.read_text())["rows"]
    path.unlink()
    return {
        " ".join(str(row[key]) for key in keys) + f", {figure}": row[figure]
        for row in rows
        for figure in timed
    }


if __name__ == "__main__":
    main()
