"""Everything that wants a GPU: the speed of steps, the presets, a base, its transfers, an ablation.

    python -m benchmarks.gpu --cifar10 data/cifar10 --transfer data/gtsrb32 --out "$OUT"

With --backbone, a Hugging Face folder, LoRA's step on it is timed beside transformers with PEFT.
Where a command may run for ten minutes only, name some of --parts a command; `transfer` then takes
the base that `base` left with --from. OUT gets the base in bfloat16, its summary and the results as
JSON. `--small` proves the script on two CPU cores in a few minutes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.results import few_tests
from vitft import load_model, save_model

PARTS = ("speed", "fast", "base", "transfer", "ablation")
LARGE = ("--image-size=224", "--batch-size=64", "--rounds=30")
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "report.html")


def runs(small: bool) -> Path:
    """Return the folder for what the runs leave."""
    return Path("runs/gpu-small" if small else "runs/gpu")


def python(module: str, *arguments: object) -> None:
    """Show and run `python -m module`, and stop where it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    click.secho("$ " + " ".join(command), bold=True)
    subprocess.run(command, check=True)


def speed(cifar10: Path, backbone: Path | None, small: bool) -> None:
    """Time the steps of every method, in both precisions, and the loop of pretraining."""
    if not small:
        python("benchmarks.attention")
    few = ["--batch-size=8", "--rounds=1"] if small else ["--rounds=50"]
    for precision in ([], ["--bf16"]):
        python("benchmarks.lora_step", *few, *([] if small and precision else precision))
        if backbone:
            some = ["--image-size=56", "--batch-size=2", "--rounds=1"] if small else LARGE
            python("benchmarks.backbone_step", backbone, *some, *precision)
    few = ["--n-images=64", "--batch-sizes=32"] if small else []
    python("benchmarks.throughput", f"--data={cifar10}", *few)
    few = ["--batch-size=8", "--rounds=1"] if small else ["--rounds=100", "--bf16"]
    python("benchmarks.inference", *few)
    few = ["--batch-size=4", "--rounds=1", "--adapters=1,2"] if small else ["--rounds=50"]
    python("benchmarks.bank", *few)
    few = ["--batch-sizes=4", "--rounds=1", "--adapters=2"] if small else ["--rounds=30"]
    python("benchmarks.sweep", *few)


def pretrain(name: str, cifar10: Path, out: Path, small: bool, *options: str) -> Path:
    """Pretrain, keep in OUT what tells of the run, and return its folder."""
    run = runs(small) / name
    few = (
        ["--limit=200", "--epochs=1", "--batch-size=64", "--val-fraction=0.004"]
        if small
        else ["--compile"]
    )
    given = [f"--data={cifar10}", f"--out={run}", "--overwrite", *options, *few]
    python("vitft", "pretrain", *given)
    for file in RUN_FILES:
        shutil.copy(run / file, out / f"{name}_{file}")
    return run


def fast(cifar10: Path, out: Path, small: bool) -> None:
    """Pretrain by the preset `fast`, with three seeds."""
    for seed in range(3):
        pretrain(f"fast-{seed}", cifar10, out, small, "--preset=fast", f"--seed={seed}")


def base(cifar10: Path, out: Path, epochs: int, small: bool) -> Path:
    """Pretrain by the preset `best`, keep the base in bfloat16, and return its run's folder."""
    run = pretrain("base", cifar10, out, small, "--preset=best", f"--epochs={epochs}")
    save_model(load_model(run).bfloat16(), out / "cifar10.safetensors")
    return run


def transfer(start: Path, data: Path, small: bool) -> None:
    """Fine-tune in every way, tuned alike, three seeds each; then with 20 images a class."""
    options = [f"--base={start}", f"--data={data}", f"--runs={runs(small)}/transfer", "--shift=2"]
    some = "--ways=linear;full;lora;dora;from scratch"
    if small:
        few = ["--seeds=2", "--rates=1", "--epochs=1", "--limit=43", "--val-fraction=0.02"]
        few += ["--batch-size=16", "--jobs=2", some]
        python("benchmarks.transfer", *options, "--name=transfer_gpu", *few)
        return
    options.append("--jobs=8")  # each waits for launches most of the time
    python("benchmarks.transfer", *options, "--name=transfer_gpu", "--epochs=10")
    for n, ways in ((20, []), (5, [some]), (100, [some])):
        few = [f"--name=transfer_{n}_gpu", "--epochs=20", f"--limit={43 * n}"]
        python("benchmarks.transfer", *options, *few, *ways)


def ablation(cifar10: Path, small: bool) -> None:
    """Go from the article's recipe to ours, one change at a time."""
    few = ["--epochs=1", "--limit=64", "--val-fraction=0.004"] if small else ["--epochs=20"]
    python("benchmarks.ablation", f"--data={cifar10}", f"--runs={runs(small)}/ablation", *few)


@click.command()
@click.option("--cifar10", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--transfer", "signs", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for it all.")
@click.option("--parts", type=click.Choice(PARTS), multiple=True, default=PARTS)
@click.option("--from", "start", type=click.Path(path_type=Path), help="A base to transfer from.")
@click.option("--backbone", type=click.Path(exists=True, path_type=Path), help="For --parts speed.")
@click.option("--epochs", default=300, show_default=True, help="Of the base, in ten minutes.")
@click.option("--small", is_flag=True, help="Few images and steps: a proof, no figures.")
def main(
    cifar10: Path,
    signs: Path,
    out: Path,
    parts: tuple[str, ...],
    start: Path | None,
    backbone: Path | None,
    epochs: int,
    small: bool,
) -> None:
    """Measure, train, transfer, and leave in OUT what is worth keeping."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["VITFT_RESULTS"] = str(out.resolve())
    if small:
        shutil.rmtree(runs(small), ignore_errors=True)
        cifar10, signs = (few_tests(data, runs(small) / data.name) for data in (cifar10, signs))
    if "speed" in parts:
        speed(cifar10, backbone, small)
    if "fast" in parts:
        fast(cifar10, out, small)
    if "base" in parts:
        start = base(cifar10, out, epochs, small)
    if "transfer" in parts:
        transfer(start or out / "cifar10.safetensors", signs, small)
    if "ablation" in parts:
        ablation(cifar10, small)


if __name__ == "__main__":
    main()
