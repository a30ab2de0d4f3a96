"""Fine-tune one base on one data set in every way, each tuned alike on validation, and tabulate.

    python -m benchmarks.transfer --base cifar10 --data data/gtsrb32
    python -m benchmarks.transfer --base cifar10 --data data/gtsrb32 --limit 860 --name transfer_20

A way is a `vitft sweep` over three learning rates, a third of ten apart, and the seeds; what it
leaves stays in --runs, and one that is complete there is not repeated. The learning rate is that of
the best mean validation accuracy; the test split is then read once for each seed at that rate.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click

from adapters import METHODS
from benchmarks.results import run_once, table, write_result

TOGETHER = "--targets=wq,wk,wv,wo,w1,w2"
WAYS: dict[str, list[str]] = {  # the methods; then LoRA's ranks and targets
    "linear": ["--adapter=linear"],
    "full": ["--adapter=full"],
    **{method: [f"--adapter={method}"] for method in METHODS},
    **{f"lora, rank {r}": ["--adapter=lora", f"--rank={r}", f"--alpha={2 * r}"] for r in (2, 32)},
    "lora, wq wv": ["--adapter=lora", "--targets=wq,wv"],
    "lora, all linears": ["--adapter=lora", TOGETHER],
    "lora+": ["--adapter=lora", "--lr-ratio=16"],
    "rslora, rank 32": ["--adapter=lora", "--rank=32", "--use-rslora"],
    "pissa": ["--adapter=lora", "--init=pissa"],
}
SCRATCH = "from scratch"  # a pretraining of the same epochs
RATES = {"linear": 1e-2, "full": 3e-4}  # the middle one of three; else 3e-3
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


def tune(way: str, lrs: list[float], seeds: int, out: Path, given: list[str]) -> dict[str, Any]:
    """Return the row of a way: its best learning rate, and the test accuracy at that rate."""
    if way == SCRATCH:
        return scratch(lrs, seeds, out, given)
    rates = ",".join(f"{lr:g}" for lr in lrs)
    command = ["sweep", *WAYS[way], f"--lr={rates}", f"--seeds={seeds}", f"--out={out}"]
    run_once([*command, "--overwrite", *given], out)
    best = json.loads((out / "sweep.json").read_text())["best"]
    runs = [json.loads(Path(f, "summary.json").read_text()) for f in best["folders"]]
    return {"lr": best.get("lr", lrs[0])} | summarise(runs, best["val_accuracy"])


def scratch(lrs: list[float], seeds: int, out: Path, given: list[str]) -> dict[str, Any]:
    """Return the row of pretraining on the data itself, for the same epochs."""
    given = [option for option in given if not option.startswith("--base")]
    found: dict[float, list[dict[str, Any]]] = {}
    for lr in lrs:
        for seed in range(seeds):
            run = out / f"{lr:g}-{seed}"
            command = ["pretrain", "--no-flip", f"--lr={lr:g}", f"--seed={seed}", f"--out={run}"]
            run_once([*command, "--batch-size=64", "--overwrite", *given], run)
            last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            summary = json.loads((run / "summary.json").read_text())
            found.setdefault(lr, []).append(summary | {"val_accuracy": last["val_accuracy"]})
    means = {lr: statistics.mean(r["val_accuracy"] for r in runs) for lr, runs in found.items()}
    best = max(means, key=lambda lr: means[lr])
    return {"lr": best} | summarise(found[best], means[best])


def summarise(runs: list[dict[str, Any]], val_accuracy: float) -> dict[str, Any]:
    """Return the figures of the runs of one way: means, and the sample deviation of accuracy."""
    first, accuracies = runs[0], [run["test_accuracy"] for run in runs]
    return {
        "test_accuracy": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "val_accuracy": val_accuracy,
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
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--runs", default="runs/transfer", show_default=True, type=click.Path(path_type=Path))
@click.option("--name", default="transfer", show_default=True, help="Of the result's file.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    base: str,
    data: str,
    ways: str,
    rates: int,
    seeds: int,
    runs: Path,
    name: str,
    options: tuple[str, ...],
) -> None:
    """Tune every way with the same OPTIONS of vitft sweep and print a table."""
    given = [f"--base={base}", f"--data={data}", *options]
    rows = []
    for way in ways.split(";"):
        middle = RATES.get(way, 3e-3)
        lrs = [middle / 3, middle, middle * 3] if rates == 3 else [middle]
        rows.append({"way": way} | tune(way, lrs, seeds, runs / name / way, given))
        click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result(name, rows, base=base, data=data, options=list(options))
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
