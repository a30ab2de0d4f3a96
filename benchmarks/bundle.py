"""Make a finished run of `vitft pretrain` a base that ships with vitft, with its model card.

python -m benchmarks.bundle runs/base --name cifar10 --about "CIFAR-10 (a JPEG copy)"
"""

import json
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.results import hardware
from recipes.sharing.card import front, yaml
from recipes.sharing.run_files import read_run_files
from vitft import load_model, save_model
from vitft.model.checkpoint import BUNDLED

CARD = """# {name}

The base that `load_model("{name}")` and `--base {name}` load.

| | |
|---|---|
| data | {about}: {n_train:,} training, {n_validation:,} validation, {n_test:,} test images |
| accuracy | **{test_accuracy:.2%}** on the test images, read once; validation {val:.2%} |
| parameters | {n_parameters:,}, kept in bfloat16, loaded as float32 |
| recipe | {recipe} |
| hardware | {hardware} ({device}), {seconds:,.0f} s of training |
| versions | {versions} |
| seed | {seed} |

One run. {note}The last epoch is what was kept; nothing was chosen by the test images.

Limits: it knows {n_classes} classes of small, centred photographs of 32 x 32 pixels, and was
trained briefly. It is a start for fine-tuning and for trying things, not a classifier to rely on.
"""

# What a reader needs to train it again, in the order of the command.
SHOWN = (
    *("preset", "epochs", "batch_size", "lr", "weight_decay", "optimizer", "schedule", "warmup"),
    *("label_smoothing", "flip", "shift", "cutmix", "sizes", "pooling", "init", "stem"),
)


def card(run: Path, name: str, about: str, note: str) -> str:
    """Return the model card of a run, with a note on how it went."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    config = json.loads((run / "config.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    head = yaml(front(read_run_files(run), name) | {"license": "mit"})
    return (
        head
        + "\n"
        + CARD.format(
            **{key: value for key, value in summary.items() if key != "versions"},
            name=name,
            about=about,
            note=f"{note} " if note else "",
            val=last["val_accuracy"],
            recipe=", ".join(f"{key} {config[key]}" for key in SHOWN),
            hardware=hardware(),
            versions=", ".join(f"{key} {value}" for key, value in summary["versions"].items()),
            n_classes=len(load_model(run).classes),
        )
    )


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="What it will be called.")
@click.option("--about", required=True, help="What it was trained on.")
@click.option("--note", default="", help="Sentences for the card on how the run went.")
def main(run: Path, name: str, about: str, note: str) -> None:
    """Write vitft/bases/NAME.safetensors in bfloat16, and NAME.md."""
    BUNDLED.mkdir(exist_ok=True)
    save_model(load_model(run).to(torch.bfloat16), BUNDLED / f"{name}.safetensors")
    (BUNDLED / f"{name}.md").write_text(card(run, name, about, note))
    click.echo(BUNDLED / f"{name}.md")


if __name__ == "__main__":
    main()
