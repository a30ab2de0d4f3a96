"""From the article's recipe to ours, one change at a time, by validation accuracy.

    python -m benchmarks.ablation --data data/cifar10 --epochs 30 --seeds 3

Every row keeps the changes above it, but what it changes itself. A run is a `vitft pretrain` of its
own; what it leaves stays in --runs, and a run that is complete there is not repeated. The test
split chooses nothing here.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.results import run_once, table, write_result
from recipes.pretrain import PRESETS

ARTICLE = {key: value for key, value in PRESETS["article"].items() if key != "epochs"}
CHANGES: dict[str, dict[str, Any]] = {
    "the article's, batch 64": {"batch_size": 64},
    "AdamW, warm-up, cosine": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup": 0.05,
        "clip": 1.0,
    },
    "no dropout": {"dropout": 0.0},
    "shifts in place of crops": {"min_area": 1.0, "shift": 4},
    "label smoothing": {"label_smoothing": 0.05},
    "mean pooling": {"pooling": "mean"},
    "small start": {"init": "small"},
    "sine and cosine positions": {"init": "sincos"},
    "mimetic attention": {"init": "mimetic"},
    "cutmix": {"cutmix": 0.5},
    "Muon": {"optimizer": "muon", "lr": 3e-3},
    "convolutional stem": {"stem": "conv"},
    "TrivialAugment": {"trivial": True},
}
COLUMNS = {"change": "", "val_accuracy": ".2%", "spread": ".2%", "images_per_second": ",.0f"}


def pretrain(values: dict[str, Any], seed: int, out: Path, options: list[str]) -> dict[str, Any]:
    """Return the last line of metrics of one run, done now unless it is there."""
    command = ["pretrain", f"--out={out}", f"--seed={seed}", "--overwrite"]
    for key, value in values.items():
        name = key.replace("_", "-")
        command.append(f"--{name}={value}" if value is not True else f"--{name}")
    run_once([*command, *options], out)
    last: dict[str, Any] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return last


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--data", required=True, help="As in vitft pretrain.")
@click.option("--epochs", default=30, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="How many, from 0.")
@click.option("--runs", default="runs/ablation", show_default=True, type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(data: str, epochs: int, seeds: int, runs: Path, options: tuple[str, ...]) -> None:
    """Train every step of the way, with the same OPTIONS of vitft pretrain, and print a table."""
    rows: list[dict[str, Any]] = []
    values = dict(ARTICLE)
    for i, (change, changed) in enumerate(CHANGES.items()):
        values |= changed
        given = [f"--data={data}", f"--epochs={epochs}", *options]
        done = [pretrain(values, seed, runs / f"{i}-{seed}", given) for seed in range(seeds)]
        accuracies = [row["val_accuracy"] for row in done]
        rows.append(
            {
                "change": change,
                "val_accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if seeds > 1 else None,
                "images_per_second": statistics.mean(row["images_per_second"] for row in done),
                "changed": changed,
            }
        )
        click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result("ablation", rows, data=data, epochs=epochs, options=list(options))
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
