"""Peak memory of LoRA on a ViT-B/16 at 224 pixels, beside transformers with PEFT.

`python -m benchmarks.memory`. Both adapt every linear of the blocks of the same folder, a ViT-B/16
of transformers with random weights, with rank 8, and train a head. Each way takes two steps in a
process of its own; its figure is how far the process grew above what it held before them, and its
peak in all.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.backbone_step import ours, theirs
from benchmarks.results import table, write_result
from vitft.data.named import import_torchvision

WAYS: dict[str, dict[str, Any]] = {
    "transformers and peft": {},
    "vitft": {},
    "vitft --checkpoint-blocks": {"checkpoint_blocks": True},
    "vitft --accumulate 4": {"accumulate": 4},
    "vitft --layers 8-11": {"layers": (8, 9, 10, 11)},
}
COLUMNS = {"way": "", "bf16": "", "growth_MB": ",.0f", "peak_MB": ",.0f", "seconds": ".1f"}


def make_folder(folder: Path) -> None:
    """Write a ViT-B/16 with random weights as a folder of transformers."""
    import_torchvision()
    import transformers

    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False).save_pretrained(folder)


def measure(way: str, folder: str, batch_size: int, bf16: bool) -> dict[str, float]:
    """Return the growth and the peak of this process in MB, and the second step's seconds."""
    pixels = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    labels = torch.arange(batch_size) % 10
    make = theirs if way.startswith("transformers") else ours
    step = make(folder, pixels, labels, bf16, **WAYS[way])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    step()
    milliseconds = step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"growth_MB": peak - before, "peak_MB": peak, "seconds": milliseconds / 1000}


@click.command()
@click.option("--batch-size", default=32, show_default=True)
@click.option("--bf16", is_flag=True, help="Under autocast.")
@click.option("--way", hidden=True)
@click.option("--folder", hidden=True)
def main(batch_size: int, bf16: bool, way: str | None, folder: str | None) -> None:
    """Measure every way in a process of its own and print a table."""
    if way is not None:
        assert folder is not None
        click.echo(json.dumps(measure(way, folder, batch_size, bf16)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as made:
        make_folder(Path(made))
        for name in WAYS:
            command = [sys.executable, "-m", "benchmarks.memory", f"--way={name}"]
            command += [f"--folder={made}", f"--batch-size={batch_size}", *["--bf16"] * bf16]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"way": name, "bf16": bf16} | json.loads(done.stdout.splitlines()[-1]))
            click.echo(table(rows[-1:], COLUMNS), err=True)
    path = write_result(f"memory_cpu_{'bf16' if bf16 else 'fp32'}", rows, batch_size=batch_size)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
