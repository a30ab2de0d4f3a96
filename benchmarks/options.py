"""What each option of `vitft finetune` changes, one at a time, on photographs.

    python -m benchmarks.options --base data/vits14-saliency --data data/clothing --image-size 56

Every run has the same images, epochs and rate, and each option is compared with the run of the same
seed without it: the spread is that of the difference. A default is chosen by validation alone; the
test split is only shown.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.results import run_once, table, write_result

CHANGES: dict[str, dict[str, list[str]]] = {  # by method
    "lora": {
        "head from zeros": ["--head-start=zeros"],
        "the last epoch": ["--keep=last"],
        "balanced weights": ["--class-weights=balanced"],
        "balanced sample": ["--sample=balanced"],
        "label smoothing 0.1": ["--label-smoothing=0.1"],
        "calibrated": ["--calibrate"],
        "average 0.9": ["--ema=0.9"],
        "average 0.99": ["--ema=0.99"],
        "mirrored": ["--flip"],
        "cut to 0.5 of the area": ["--flip", "--min-area=0.5", "--max-ratio=1.33"],
        "cut to 0.08 of the area": ["--flip", "--min-area=0.08", "--max-ratio=1.33"],
        "TrivialAugment": ["--flip", "--trivial"],
        "RandAugment": ["--flip", "--rand"],
        "erased 0.25": ["--flip", "--erase=0.25"],
        "mixup 0.5": ["--mixup=0.5"],
        "cutmix 0.5": ["--cutmix=0.5"],
        "padded": ["--resize=pad"],
        "squashed": ["--resize=squash"],
        "the middle 0.875": ["--crop=0.875"],
        "float32": ["--precision=fp32"],
        "last 2 blocks whole": ["--unfreeze=2"],
    },
    "full": {
        "head from zeros": ["--head-start=zeros"],
        "layer decay 0.75": ["--layer-decay=0.75"],
        "average 0.99": ["--ema=0.99"],
    },
    "linear": {"last 2 blocks whole": ["--unfreeze=2", "--lr=1e-4"]},
}
COLUMNS = {
    "adapter": "",
    "change": "",
    **dict.fromkeys(("val_accuracy", "val_difference", "val_spread"), ".2%"),
    **dict.fromkeys(("test_accuracy", "test_difference", "test_spread"), ".2%"),
    "test_calibration_error": ".2%",
    "seconds": ".1f",
}


def row(
    adapter: str, change: str, runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of a change beside the runs without it, seed by seed."""
    found: dict[str, Any] = {"adapter": adapter, "change": change}
    for split in ("val", "test"):
        key = f"{split}_accuracy"
        differences = [a[key] - b[key] for a, b in zip(runs, plain, strict=True)]
        found[key] = statistics.mean(run[key] for run in runs)
        found[f"{split}_difference"] = statistics.mean(differences)
        found[f"{split}_spread"] = statistics.stdev(differences) if len(runs) > 1 else None
    for key in ("test_calibration_error", "seconds"):
        found[key] = statistics.mean(run[key] for run in runs)
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--base", required=True, help="As in vitft finetune.")
@click.option("--data", required=True, help="As in vitft finetune.")
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--runs", default="runs/options", show_default=True, type=click.Path(path_type=Path))
@click.option("--name", default="options", show_default=True, help="Of the result's file.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(base: str, data: str, seeds: int, runs: Path, name: str, options: tuple[str, ...]) -> None:
    """Train with and without every option, all with OPTIONS of vitft finetune, and tabulate."""
    given = ["finetune", f"--base={base}", f"--data={data}", *options]

    def trained(adapter: str, place: str, changed: list[str]) -> list[dict[str, Any]]:
        summaries = []
        for seed in range(seeds):
            out = runs / name / f"{adapter}-{place}-{seed}"
            command = [*given, f"--adapter={adapter}", f"--seed={seed}"]
            run_once([*command, *changed, f"--out={out}", "--overwrite"], out)
            summaries.append(json.loads((out / "summary.json").read_text()))
        return summaries

    rows: list[dict[str, Any]] = []
    for adapter, changes in CHANGES.items():
        plain = trained(adapter, "plain", [])
        rows.append(row(adapter, "-", plain, plain))
        for change, changed in changes.items():
            place = change.replace(" ", "_")
            rows.append(row(adapter, change, trained(adapter, place, changed), plain))
            click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result(name, rows, base=base, data=data, options=list(options), seeds=seeds)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
