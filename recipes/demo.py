"""Everything from pretraining to a merged adapter, in a few minutes, on drawn images: `make demo`.

A small base learns shapes; a linear probe and LoRA teach it symbols; the adapter is reloaded in
code, classifies an image file and is baked in. On two CPU cores the probe stays far behind LoRA.
At the end, LoRA adapts the last two blocks of the bundled base, on a few of the images.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

import adapters
from vitft import load_model
from vitft.data.shapes import CLASSES, draw

SIZES = "--dim 128 --hidden-dim 256 --n-heads 4 --n-layers 4"
METHODS = ("linear", "lora")
BUNDLED = "--base cifar10 --layers 4-5 --limit 400 --epochs 8"


def vitft(arguments: str) -> None:
    """Show a command, run it as a user would, and stop the demo where it fails."""
    click.secho(f"\n$ vitft {arguments}", bold=True)
    done = subprocess.run([sys.executable, "-m", "vitft", *shlex.split(arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def demo(folder: Path) -> list[dict[str, Any]]:
    """Run the demo, with all its files below `folder`, and return the summaries of its runs."""
    base = folder / "base"
    vitft(
        f"pretrain --data shapes --out {base} --epochs 6 --sizes 16:0.67 "
        f"--batch-size 64 {SIZES} --overwrite"
    )
    for method in METHODS:
        vitft(
            f"finetune --adapter {method} --base {base} --data symbols "
            f"--out {folder / method} --epochs 2 --overwrite"
        )
    file = folder / "an-image.png"
    images, labels = draw("symbols", 1, seed=99)
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file)
    click.echo(f"\nAn image of {CLASSES['symbols'][int(labels[0])]}, {file}:")
    vitft(f"predict --base {base} --adapter {folder / 'lora'} {file} --top 3")
    click.echo("\nThe same in code:\n" + reload_in_code(base, folder / "lora", images))
    (folder / "merged.safetensors").unlink(missing_ok=True)
    vitft(f"merge --base {base} --adapter {folder / 'lora'} --out {folder / 'merged.safetensors'}")
    vitft(
        f"finetune --adapter lora {BUNDLED} --data symbols --out {folder / 'shipped'} --overwrite"
    )
    names = ("base", *METHODS, "shipped")
    return [json.loads((folder / name / "summary.json").read_text()) for name in names]


def reload_in_code(base: Path, adapter: Path, images: torch.Tensor) -> str:
    """Return the class of the first of uint8 images (n, 3, height, width), and its probability."""
    model = load_model(base)
    adapters.load_adapter(model, adapter)
    with torch.inference_mode():
        probabilities = model(model.normalize(images)).softmax(dim=1)
    best = probabilities[0].max(dim=0)
    return f"  {model.classes[int(best.indices)]} {best.values:.1%}"


def table(summaries: list[dict[str, Any]]) -> str:
    """Return a table with a line for each run."""
    lines = ["data     images  trained  parameters    share  test accuracy  seconds"]
    for summary in summaries:
        n, total = summary["n_trainable"], summary["n_parameters"]
        method = summary.get("adapter", "all")
        seconds = summary["seconds"] + summary.get("feature_seconds", 0)
        lines.append(
            f"{summary['data']:<8} {summary['n_train']:>6,}  {method:<8} {n:>9,} {n / total:>8.2%} "
            f"{summary['test_accuracy']:>14.2%} {seconds:>8.1f}"
        )
    return "\n".join(lines)


@click.command()
@click.option("--out", default="runs/demo", help="Folder for everything that the demo writes.")
def main(out: str) -> None:
    """Pretrain, fine-tune, reload, predict and merge, on images drawn by the program."""
    started = time.perf_counter()
    summaries = demo(Path(out))
    click.echo(
        f"\n{table(summaries)}\n\nThat took {time.perf_counter() - started:.0f} s; ", nl=False
    )
    click.echo(f"open {Path(out, 'lora', 'report.html')} to see what LoRA still gets wrong.")


if __name__ == "__main__":
    main()
