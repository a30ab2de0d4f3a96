"""Fine-tune one base on one data set in every way, each tuned alike on validation, and tabulate.

    python -m benchmarks.transfer --base cifar10 --data data/gtsrb32
    python -m benchmarks.transfer --base cifar10 --data data/gtsrb32 --limit 860 --name transfer_20

The learning rate is the best of three, each three times the last, by the validation accuracy of the
first seed; where that is the lowest or the highest, further ones are tried until none is better.
The test split is then read once for each seed at that rate. Each is a `vitft sweep`; what it leaves
stays in --runs, and one that is complete there is not repeated. With --rates-from, the learning
rates that another result found stand, and only a way that it lacks is tuned.
"""

import json
import os
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from adapters import METHODS
from benchmarks.results import few_tests, run_once, table, write_result

ATTENTION = "--targets=wq,wk,wv,wo"
WAYS: dict[str, list[str]] = {  # the baselines and methods; then LoRA's ranks and targets
    "linear": ["--adapter=linear"],
    "full": ["--adapter=full"],
    "full, muon": ["--adapter=full", "--optimizer=muon"],
    **{method: [f"--adapter={method}"] for method in METHODS},
    **{f"lora, rank {r}": ["--adapter=lora", f"--rank={r}", f"--alpha={2 * r}"] for r in (2, 32)},
    "lora, wq wv": ["--adapter=lora", "--targets=wq,wv"],
    "lora, wq wk wv wo": ["--adapter=lora", ATTENTION],
    "lora+": ["--adapter=lora", "--lr-ratio=16"],
    "rslora, rank 32": ["--adapter=lora", "--rank=32", "--use-rslora"],
    "pissa": ["--adapter=lora", "--init=pissa"],
}
SCRATCH = "from scratch"  # a pretraining of the same epochs
RATES = {"full": 1e-3}  # the middle one of three; else 3e-3
COLUMNS = {
    "way": "",
    "test_accuracy": ".2%",
    "spread": ".2%",
    "val_accuracy": ".2%",
    "lr": "g",
    "n_trainable": ",",
    "share": ".2%",
    "seconds": ",.0f",
    "file_kB": ",.0f",
}


Runs = tuple[float, list[dict[str, Any]]]  # the best learning rate, and the summaries at it


def tune(way: str, lrs: list[float], seeds: int, out: Path, given: list[str]) -> dict[str, Any]:
    """Return the row of a way: its best learning rate, and the test accuracy at that rate."""
    train = scratch if way == SCRATCH else sweep
    lr, runs = train(way, lrs, [0], out, given)
    step = {lrs[0]: 1 / 3, lrs[-1]: 3}.get(lr) if len(lrs) > 1 else None
    while step:  # the best stood at an edge
        beyond = float(f"{lr * step:g}")
        try:
            _, further = train(way, [beyond], [0], out, given)
        except subprocess.CalledProcessError:  # it diverged
            break
        if further[0]["val_accuracy"] <= runs[0]["val_accuracy"]:
            break
        lr, runs = beyond, further
    if seeds > 1:
        runs += train(way, [lr], [*range(1, seeds)], out, given)[1]
    return {"way": way, "lr": lr} | summarise(runs)


def sweep(way: str, lrs: list[float], seeds: list[int], out: Path, given: list[str]) -> Runs:
    """Train every rate with every seed together, over one frozen base."""
    rates = ",".join(f"{lr:g}" for lr in lrs)
    out = out / f"{rates}-{seeds[0]}"
    command = ["sweep", *WAYS[way], f"--lr={rates}", f"--seed={seeds[0]}", f"--seeds={len(seeds)}"]
    run_once([*command, f"--out={out}", "--overwrite", *given], out)
    best = json.loads((out / "sweep.json").read_text())["best"]
    runs = [json.loads(Path(folder, "summary.json").read_text()) for folder in best["folders"]]
    return best.get("lr", lrs[0]), runs


def scratch(way: str, lrs: list[float], seeds: list[int], out: Path, given: list[str]) -> Runs:
    """Pretrain on the data itself instead, for the same epochs."""
    given = [option for option in given if not option.startswith("--base")]
    found: dict[float, list[dict[str, Any]]] = {lr: [] for lr in lrs}
    for lr in lrs:
        for seed in seeds:
            run = out / f"{lr:g}-{seed}"
            command = ["pretrain", "--no-flip", f"--lr={lr:g}", f"--seed={seed}", f"--out={run}"]
            run_once([*command, "--overwrite", *given], run)
            found[lr].append(json.loads((run / "summary.json").read_text()))
    best = max(lrs, key=lambda lr: statistics.mean(run["val_accuracy"] for run in found[lr]))
    return best, found[best]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the runs of one way: means, and the sample deviation of accuracy."""
    first, accuracies = runs[0], [run["test_accuracy"] for run in runs]
    return {
        "test_accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "val_accuracy": statistics.mean(run["val_accuracy"] for run in runs),
        "n_trainable": first["n_trainable"],
        "share": first["n_trainable"] / first["n_parameters"],
        "seconds": statistics.mean(run["seconds"] + run.get("feature_seconds", 0) for run in runs),
        "file_kB": first["file_bytes"] / 1000 if "file_bytes" in first else None,
        "n_train": first["n_train"],
        "n_test": first["n_test"],
        "seeds": [run["seed"] for run in runs],
        "device": first["device"],
    }


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--base", required=True, help="As in vitft finetune.")
@click.option("--data", required=True, help="As in vitft finetune.")
@click.option("--ways", default=";".join([*WAYS, SCRATCH]), help="With semicolons; all by default.")
@click.option("--rates", default=3, show_default=True, help="Learning rates of each: 1 or 3.")
@click.option(
    "--rates-from",
    type=click.Path(exists=True, path_type=Path),
    help="A result to take them from.",
)
@click.option("--middles", default="", help="The middle rate of three: full=1e-4;ssf=3e-3.")
@click.option("--lr", type=float, help="The learning rate of all of them; none is searched for.")
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--jobs", default=1, show_default=True, help="Ways at a time, sharing the cores.")
@click.option("--tests", type=int, help="Test images of each class.  [default: all]")
@click.option("--runs", default="runs/transfer", show_default=True, type=click.Path(path_type=Path))
@click.option("--name", default="transfer", show_default=True, help="Of the result's file.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    base: str,
    data: str,
    ways: str,
    rates: int,
    rates_from: Path | None,
    middles: str,
    lr: float | None,
    seeds: int,
    jobs: int,
    tests: int | None,
    runs: Path,
    name: str,
    options: tuple[str, ...],
) -> None:
    """Tune every way with the same OPTIONS of vitft sweep and print a table."""
    runs = runs / name
    images = few_tests(Path(data), runs / "data", tests) if tests else data
    given = [f"--base={base}", f"--data={images}", *options]
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))

    usual = RATES | {way: float(rate) for way, _, rate in _pairs(middles)}
    chosen: dict[str, float] = {}
    if lr is not None:
        chosen = dict.fromkeys(ways.split(";"), lr)
    elif rates_from:
        earlier = json.loads(rates_from.read_text())["rows"]
        chosen = {row["way"]: row["lr"] for row in earlier}

    def row(way: str) -> dict[str, Any]:
        middle = chosen.get(way, usual.get(way, 3e-3))
        around = [middle] if rates == 1 or way in chosen else [middle / 3, middle, middle * 3]
        lrs = [float(f"{rate:g}") for rate in around]  # as the command line has them
        found = tune(way, lrs, seeds, runs / way, given)
        click.echo(table([found], COLUMNS), err=True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(row, ways.split(";")))
    facts = {"base": base, "data": data, "tests": tests, "options": list(options), "jobs": jobs}
    facts |= {"rates_from": rates_from.name} if rates_from else {}
    path = write_result(name, rows, **facts)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [pair.partition("=") for pair in text.split(";") if pair]


if __name__ == "__main__":
    main()
