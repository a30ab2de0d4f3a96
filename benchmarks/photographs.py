"""From a folder of photographs to a test accuracy: `vitft finetune`, and transformers' `Trainer`.

    python -m benchmarks.photographs --base data/vits14-saliency --data data/clothing

Both start as a process of their own and end with the accuracy on the test split: the same
training images, epochs, batch size and learning rate; LoRA of rank 8 on every linear of the blocks;
no augmentation. vitft takes float32, as the peer does; the same with smaller images in the first
epochs; the same in fewer epochs, since what counts is the time to an accuracy; and what it chooses
by itself, bfloat16 where the processor has it. The peer is `Trainer` with PEFT and torchvision's
transforms in a DataLoader with as many workers as cores. In turn; seconds are of the clock,
megabytes the peak of the largest process.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.backbone_step import peft_model
from benchmarks.results import table, write_result
from vitft.data.named import import_torchvision

COLUMNS = {"way": "", "seconds": ",.0f", "megabytes": ",.0f", "test_accuracy": ".2%"}


@click.command()
@click.option("--base", required=True, help="A Hugging Face folder.")
@click.option("--data", required=True, help="A folder with train/CLASS and test/CLASS.")
@click.option("--image-size", default=112, show_default=True)
@click.option("--shots", default=30, show_default=True, help="Training images of each class.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--sizes", default="84:0.67", show_default=True, help="Smaller images first.")
@click.option("--fewer", default=1, show_default=True, help="Epochs of a shorter run.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--peer", type=click.Path(path_type=Path), hidden=True)
def main(peer: Path | None, rounds: int, sizes: str, fewer: int, **given: Any) -> None:
    """Run all ways in turn and print the medians."""
    if peer is not None:
        peer.write_text(json.dumps({"test_accuracy": train_peer(**given)}))
        return
    options = given | {"sizes": sizes, "fewer": fewer}
    ways = {
        "vitft, float32": ["--precision=fp32"],
        f"vitft, float32, --sizes {sizes}": ["--precision=fp32", f"--sizes={sizes}"],
        f"vitft, float32, --epochs {fewer}": ["--precision=fp32", f"--epochs={fewer}"],
        "vitft, by itself": [],
    }
    with TemporaryDirectory() as folder:
        data = few_images(Path(given["data"]), Path(folder, "data"), given.pop("shots"))
        n = sum(1 for _ in data.glob("train/*/*"))
        given["data"] = str(data)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for i in range(rounds):
            out = Path(folder, f"peer{i}.json")
            command = ["-m", "benchmarks.photographs", *flags, f"--peer={out}"]
            found["transformers' Trainer"].append(timed(command) | json.loads(out.read_text()))
            for way, own in ways.items():
                out = Path(folder, f"{len(found[way])} {way}")
                command = ["-m", "vitft", "finetune", "--adapter=lora", *flags, f"--out={out}"]
                cost = timed([*command, *own, "--val-fraction=0", "--rank=8", "--alpha=16"])
                told = json.loads((out / "summary.json").read_text())
                found[way].append(cost | {"test_accuracy": told["test_accuracy"]})
    rows = [
        {"way": way} | {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in found.items()
    ]
    path = write_result("photographs_cpu", rows, rounds=rounds, images=n, options=options)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


def few_images(data: Path, folder: Path, shots: int) -> Path:
    """Return a folder, as links, with some training images of `data` and all its test images."""
    for part in ("train", "test"):
        for path in sorted((data / part).iterdir()):
            (folder / part / path.name).mkdir(parents=True)
            images = sorted(path.resolve().iterdir())
            for image in images[:shots] if part == "train" else images:
                (folder / part / path.name / image.name).symlink_to(image)
    return folder


def timed(command: list[str]) -> dict[str, float]:
    """Run Python with these arguments; return its seconds and the peak of its memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, command)
    return {"seconds": time.perf_counter() - started, "megabytes": usage.ru_maxrss / 1000}


def train_peer(
    base: str, data: str, image_size: int, epochs: int, batch_size: int, lr: float, **_: Any
) -> float:
    """Fine-tune by transformers' Trainer with PEFT; return the test accuracy."""
    torchvision = import_torchvision()
    import transformers

    transforms = torchvision.transforms
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    share = processor.crop_size["height"] / processor.size["shortest_edge"]
    view = transforms.Compose(
        [
            transforms.Resize(round(image_size / share), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    sets = [
        torchvision.datasets.ImageFolder(Path(data, part), view, loader=_open)
        for part in ("train", "test")
    ]
    torch.manual_seed(0)
    model = peft_model(base, len(sets[0].classes))
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(data, "..", "trainer")),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=epochs * len(sets[0]) // batch_size // 20,
        dataloader_num_workers=os.cpu_count() or 1,
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=sets[0],
        data_collator=_collate,
    )
    trainer.train()
    found = trainer.predict(sets[1])
    return float((np.argmax(found.predictions, axis=1) == found.label_ids).mean())


def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _collate(items: list[Any]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([image for image, _ in items]),
        "labels": torch.tensor([label for _, label in items]),
    }


if __name__ == "__main__":
    main()
