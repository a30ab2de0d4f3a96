"""Fine-tune one base on one data set by several methods, seed by seed, and tabulate the runs.

    python -m benchmarks.transfer --base runs/base --data data/gtsrb32

Every run is a `vitft finetune` of its own; what it leaves stays in --runs, and a run that is
complete there is not repeated.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.results import run_once, table, write_result

COLUMNS = {
    "adapter": "",
    "test_accuracy": ".2%",
    "spread": ".2%",
    "n_trainable": ",",
    "share": ".2%",
    "images_per_second": ",.0f",
    "feature_seconds": ",.0f",
    "seconds": ",.0f",
    "file_bytes": ",",
}


def finetune(method: str, seed: int, runs: Path, options: list[str]) -> dict[str, Any]:
    """Return the summary of one run, done now unless it is there."""
    out = runs / f"{method}-{seed}"
    command = ["finetune", f"--adapter={method}", f"--out={out}", f"--seed={seed}", "--overwrite"]
    run_once([*command, *options], out)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row for the runs of a method: means, and the sample deviation of accuracy."""
    first, accuracies = runs[0], [run["test_accuracy"] for run in runs]
    means = {
        key: statistics.mean(run[key] for run in runs)
        for key in ("images_per_second", "seconds", "feature_seconds")
    }
    return {
        **{key: first[key] for key in ("adapter", "n_trainable", "n_parameters", "file_bytes")},
        **means,
        "test_accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "share": first["n_trainable"] / first["n_parameters"],
        "seeds": [run["seed"] for run in runs],
        "n_train": first["n_train"],
        "n_test": first["n_test"],
        "device": first["device"],
    }


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--base", required=True, help="As in vitft finetune.")
@click.option("--data", required=True, help="As in vitft finetune.")
@click.option("--methods", default="linear,lora,dora,full", show_default=True)
@click.option("--seeds", default=1, show_default=True, help="How many, from 0.")
@click.option("--runs", default="runs/transfer", show_default=True, type=click.Path(path_type=Path))
@click.option("--name", default="transfer", show_default=True, help="Of the result's file.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    base: str, data: str, methods: str, seeds: int, runs: Path, name: str, options: tuple[str, ...]
) -> None:
    """Run every method with the same OPTIONS of vitft finetune and print a table."""
    given = [f"--base={base}", f"--data={data}", *options]
    rows = []
    for method in methods.split(","):
        rows.append(summarise([finetune(method, seed, runs, given) for seed in range(seeds)]))
        click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result(name, rows, base=base, data=data, options=list(options))
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
