"""Everything that wants a GPU, in one command: a base, its transfers, and the speed of the steps.

    python -m benchmarks.gpu --cifar10 data/cifar10 --transfer data/gtsrb32 --out "$OUT"

It leaves in OUT the base in bfloat16, the summaries of its runs and the results as JSON. On a CPU,
`--limit 200 --epochs 1` proves the script in a few minutes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.results import FOLDER
from vitft import load_model, save_model


def python(module: str, *arguments: object) -> None:
    """Show and run `python -m module`, and stop where it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    click.secho("$ " + " ".join(command), bold=True)
    subprocess.run(command, check=True)


@click.command()
@click.option("--cifar10", required=True, type=click.Path(exists=True), help="Folder of the set.")
@click.option("--transfer", required=True, type=click.Path(exists=True), help="Folder to adapt to.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for it all.")
@click.option("--epochs", default=300, show_default=True, help="Of pretraining.")
@click.option("--limit", type=int, help="Use only so many training images.")
def main(cifar10: str, transfer: str, out: Path, epochs: int, limit: int | None) -> None:
    """Pretrain, transfer, time the steps, and collect what is worth keeping."""
    few = [f"--limit={limit}"] if limit else []
    base, runs = Path("runs/gpu/base"), Path("runs/gpu/transfer")
    recipe = ["--batch-size=512", "--lr=2e-3", "--cutmix=0.5", "--mixup=0.3", "--compile"]
    quick = ["--batch-size=64"] if limit else recipe
    given = [f"--data={cifar10}", f"--out={base}", f"--epochs={epochs}", "--overwrite"]
    python("vitft", "pretrain", *given, *quick, *few)
    epochs_each = "--epochs=1" if limit else "--epochs=30"
    options = [f"--base={base}", f"--data={transfer}", f"--runs={runs}", "--name=transfer_gpu"]
    python("benchmarks.transfer", *options, f"--seeds={1 if limit else 3}", epochs_each, *few)
    for precision in ((), ("--bf16",)):
        small = ("--batch-size=8", "--rounds=1") if limit else ()
        python("benchmarks.lora_step", *small, *precision)
    out.mkdir(parents=True, exist_ok=True)
    save_model(load_model(base).bfloat16(), out / "cifar10.safetensors")
    shutil.copy(base / "summary.json", out / "base.json")
    for path in FOLDER.glob("*.json"):
        shutil.copy(path, out)


if __name__ == "__main__":
    main()
