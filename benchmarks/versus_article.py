"""The article's loop and `vitft pretrain` for the same time on the same images, in one run.

    python -m benchmarks.versus_article data/cifar10 --seconds 120

vitft has no time limit, so a short trial tells how many images it trains on in that time.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.results import FOLDER, few_tests, table, write_result

LOOPS = "Batch sizes of the article's loop, and presets of vitft's."
# Of vitft pretrain, and the least number of epochs: "cpu" divides them among image sizes.
OPTIONS = {"default": (["--batch-size=64"], 1), "cpu": ([], 6)}
COLUMNS = {
    "loop": "",
    "batch_size": "",
    "images_per_second": ",.1f",
    "train_seconds": ",.0f",
    "test_accuracy": ".2%",
}


def article(
    data: Path, seconds: float, batch_size: int, workers: int, folder: Path
) -> dict[str, Any]:
    """Return what the article's loop reached after `seconds` of training."""
    file = folder / f"article-{batch_size}.json"
    command = [sys.executable, "-m", "benchmarks.article", str(data), f"--seconds={seconds}"]
    command += [f"--batch-size={batch_size}", f"--workers={workers}", f"--json={file}"]
    command += ["--test-limit=2000"]  # its loader takes long
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"loop": "article", **json.loads(file.read_text())}


def pretrain(data: Path, out: Path, preset: str, options: list[str]) -> dict[str, Any]:
    """Return what `vitft pretrain` reached."""
    command = [sys.executable, "-m", "vitft", "pretrain", f"--data={data}", f"--out={out}"]
    command += [f"--preset={preset}", "--overwrite", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    config = json.loads((out / "config.json").read_text())
    summary["loop"], summary["train_seconds"] = f"vitft {preset}", summary["seconds"]
    return {**summary, "batch_size": config["batch_size"], "epochs": config["epochs"]}


def for_seconds(data: Path, seconds: float, preset: str, folder: Path) -> dict[str, Any]:
    """Return what `vitft pretrain` reached in about `seconds` of training."""
    few = few_tests(data, folder / f"few-{preset}")
    options, least = OPTIONS[preset]
    trial = pretrain(few, folder / "trial", preset, ["--limit=1024", f"--epochs={least}", *options])
    n_images = trial["images_per_second"] * seconds
    epochs = max(least, round(n_images / 45_000))
    given = [f"--limit={round(n_images / epochs)}", f"--epochs={epochs}", *options]
    return pretrain(data, folder / "run", preset, given)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seconds", default=120.0, show_default=True, help="Of training, for each.")
@click.option("--workers", default=4, show_default=True, help="Of the article's loader.")
@click.option("--loops", default="16,64,default,cpu", show_default=True, help=LOOPS)
@click.option("--add", is_flag=True, help="Keep the rows that the last run wrote.")
def main(data: Path, seconds: float, workers: int, loops: str, add: bool) -> None:
    """Train on DATA by the article's loop with batches of 16 and 64 and by vitft; print a table."""
    rows = json.loads((FOLDER / "versus_article.json").read_text())["rows"] if add else []
    with tempfile.TemporaryDirectory() as temporary:
        for loop in loops.split(","):
            if loop.isdecimal():
                rows.append(article(data, seconds, int(loop), workers, Path(temporary)))
            else:
                rows.append(for_seconds(data, seconds, loop, Path(temporary)))
    path = write_result("versus_article", rows, data=str(data))
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
