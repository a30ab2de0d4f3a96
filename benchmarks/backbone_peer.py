"""Fine-tuning a known backbone by transformers and PEFT in a plain loop, for its accuracy.

`python -m benchmarks.backbone_peer FOLDER DATA --limit 500`, beside `benchmarks.transfer` with the
same options: the same images in the same batches, rank 8 on every linear of the blocks, AdamW, a
cosine with warm-up, clipping at 1. The rate is the best of several by validation; the test split is
read once, at that rate.
"""

import copy
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.backbone_step import peft_model
from benchmarks.results import table, write_result
from vitft import load_model
from vitft.data.load import load_data
from vitft.data.split import limit as limited
from vitft.data.split import split
from vitft.optimizers.build import lr_factor
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit

COLUMNS = {"way": "", "lr": "g", "val_accuracy": ".2%", "test_accuracy": ".2%", "seconds": ",.0f"}
CPU = torch.device("cpu")


def predict(model: nn.Module, images: Images, mean: Tensor, std: Tensor, bf16: bool) -> float:
    """Return the share of images that are predicted right."""
    right = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for pixels, labels in images.batches(torch.arange(len(images)).split(100), CPU):
            logits = model.eval()((pixels / 255 - mean) / std).logits
            right += int((logits.argmax(1) == labels).sum())
    return right / len(images)


def fit(
    model: nn.Module, images: Images, lr: float, epochs: int, batch: int, bf16: bool, norm: Any
) -> float:
    """Train the model in place and return the seconds."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
    n_steps, done, started = epochs * -(-len(images) // batch), 0, time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for pixels, labels in images.batches(order.split(batch), CPU):
            factor = lr_factor("cosine", (done + 0.5) / n_steps, warmup=0.05)
            optimizer.param_groups[0]["lr"] = lr * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model.train()((pixels / 255 - norm[0]) / norm[1]).logits
            F.cross_entropy(logits.float(), labels).backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    return time.perf_counter() - started


@click.command()
@click.argument("folder")
@click.argument("data")
@click.option("--limit", type=int)
@click.option("--image-size", default=112, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rates", default="3e-4,1e-3,3e-3", show_default=True)
@click.option("--fp32", is_flag=True, help="Not under autocast to bfloat16.")
@click.option(
    "--name", default="backbone_peer_cpu", show_default=True, help="Of the result's file."
)
def main(
    folder: str,
    data: str,
    limit: int | None,
    image_size: int,
    epochs: int,
    batch_size: int,
    rates: str,
    fp32: bool,
    name: str,
) -> None:
    """Tune by validation and print a table."""
    base = load_model(folder)  # for its mean and deviation
    images = load_data(data, Fit(image_size))
    train, validation = split(images.train, fraction=0.1, seed=0)
    train = limited(train, limit, seed=0) if limit else train
    train, validation, test = (x.to(CPU) for x in (train, validation, images.test))
    norm = [torch.tensor(x)[:, None, None] for x in (base.mean, base.std)]
    torch.manual_seed(0)
    fresh, bf16 = peft_model(folder, len(images.classes)), not fp32
    rows: list[dict[str, Any]] = []
    best: tuple[float, nn.Module] = (-1.0, fresh)
    for lr in map(float, rates.split(",")):
        model = copy.deepcopy(fresh)
        seconds = fit(model, train, lr, epochs, batch_size, bf16, norm)
        accuracy = predict(model, validation, *norm, bf16)
        rows.append({"way": "transformers and peft", "lr": lr, "val_accuracy": accuracy})
        rows[-1] |= {"test_accuracy": None, "seconds": seconds}
        best = max(best, (accuracy, model), key=lambda pair: pair[0])
        click.echo(table(rows[-1:], COLUMNS), err=True)
    chosen = max(rows, key=lambda row: row["val_accuracy"])
    chosen["test_accuracy"] = predict(best[1], test, *norm, bf16)
    facts = {"data": data, "limit": limit, "image_size": image_size, "epochs": epochs, "bf16": bf16}
    path = write_result(name, rows, base=Path(folder).name, batch_size=batch_size, **facts)
    click.echo(f"{table(rows, COLUMNS)}\n\n{path}")


if __name__ == "__main__":
    main()
