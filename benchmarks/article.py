"""The article's training loop as a peer to measure against: a folder of images in, one JSON out.

It keeps the article's choices, good and bad: a model that merges its heads wrongly, augmentation
of one PIL image after another in DataLoader workers, validation on augmented images, float32.
It shares nothing with vitft but the import of torchvision.

    python -m benchmarks.article data/cifar10 --seconds 60 --json article.json
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, random_split

from vitft.data.named import import_torchvision

import_torchvision()  # its own import fails where its operators were built for another torch
from torchvision import transforms  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

DIM, HIDDEN_DIM, N_HEADS, N_LAYERS, PATCH_SIZE, N_CLASSES, DROPOUT = 256, 512, 8, 6, 4, 10, 0.2
N_PATCHES = (32 // PATCH_SIZE) ** 2
N_PARAMETERS = 3_189_002
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)

Batches = DataLoader[tuple[Tensor, Tensor]]  # images (B, 3, 32, 32) and labels (B,)


class Attention(nn.Module):
    """Self-attention on tokens (B, N, D), with the article's defect."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens, (B, N, D)."""
        q, k, v = (w(x).view(*x.shape[:2], N_HEADS, -1) for w in (self.wq, self.wk, self.wv))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, K)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM // N_HEADS)  # (B, H, N, N)
        heads = torch.matmul(F.softmax(scores, dim=-1), v)  # (B, H, N, K)
        # The defect: without a transpose back, a row of the view holds several tokens of one head.
        merged: Tensor = self.wo(heads.contiguous().view(x.shape))
        return merged


class Block(nn.Module):
    """Attention, then a feed-forward, each after a LayerNorm and added to the tokens (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(DIM), Attention(), nn.LayerNorm(DIM)
        self.feed_forward = nn.Sequential(
            nn.Linear(DIM, HIDDEN_DIM),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN_DIM, DIM),
            nn.Dropout(DROPOUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, D)."""
        x = x + self.attention(self.norm1(x))
        tokens: Tensor = x + self.feed_forward(self.norm2(x))
        return tokens


class ArticleViT(nn.Module):
    """Images (B, 3, 32, 32) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3 * PATCH_SIZE**2, DIM)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + N_PATCHES, DIM))
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, N_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 10)."""
        patches = F.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # (B, 64, 48)
        tokens = torch.cat(
            (self.cls_token.expand(len(images), -1, -1), self.patch_embed(patches)), 1
        )
        x = self.blocks(self.dropout(tokens + self.pos_embedding))  # (B, 65, D)
        logits: Tensor = self.head(x[:, 0])
        return logits


@dataclass
class Clock:
    """What training took, evaluation left out."""

    steps: int = 0  # batches trained on
    seconds: float = 0.0  # spent on them, from the start of an epoch's workers on
    first: float = 0.0  # the part of it until the very first batch was trained on


def speed(clock: Clock, batch_size: int) -> dict[str, float | None]:
    """Return images a second, without and with the time up to the first batch; None if none."""
    images, later = clock.steps * batch_size, clock.seconds - clock.first
    return {
        "images_per_second": (images - batch_size) / later if later else None,
        "images_per_second_with_start": images / clock.seconds if images else None,
        "train_seconds": clock.seconds,
    }


def loaders(folder: Path, batch_size: int, workers: int, test_limit: int | None) -> list[Batches]:
    """Return the article's training, validation and test batches of an image folder."""
    normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.9, 1.1)),
    ]
    train_set = ImageFolder(str(folder / "train"), transforms.Compose(augment + normalize))
    test_set = ImageFolder(str(folder / "test"), transforms.Compose(normalize))
    if len(train_set.classes) != N_CLASSES:
        raise click.ClickException(
            f"{folder} has {len(train_set.classes)} classes; the article has 10"
        )
    train, val = random_split(train_set, [0.9, 0.1])
    count = min(test_limit or len(test_set), len(test_set))
    test = Subset(test_set, torch.linspace(0, len(test_set) - 1, count).long().tolist())
    return [
        DataLoader(train, batch_size, shuffle=True, drop_last=True, num_workers=workers),
        DataLoader(val, batch_size, num_workers=workers),
        DataLoader(test, batch_size, num_workers=workers),
    ]


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, clock: Clock, stop: float
) -> bool:
    """Train for an epoch, or until the time `stop`; return whether the epoch was finished."""
    device = next(model.parameters()).device
    model.train()
    start, before = time.perf_counter(), clock.seconds
    for images, labels in batches:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device, so that the clock tells the truth
        now = time.perf_counter()
        clock.steps += 1
        clock.seconds = before + now - start
        clock.first = clock.first or clock.seconds
        if now >= stop:
            return False
    return True


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Return the share of images classified rightly, in 0..1."""
    device = next(model.parameters()).device
    model.eval()
    hits = [
        (model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in batches
    ]
    return float(torch.cat(hits).mean())


def train(
    model: nn.Module, batches: Batches, val: Batches, *, epochs: int, seconds: float
) -> tuple[Clock, int]:
    """Train as the article does until either limit; return the clock and the epochs finished."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [80, 130], gamma=0.1)
    clock, stop = Clock(), time.perf_counter() + seconds
    for epoch in range(epochs):
        if not train_epoch(model, optimizer, batches, clock, stop):
            return clock, epoch
        schedule.step()
        click.echo(f"epoch {epoch + 1}: validation accuracy {accuracy(model, val):.4f}", err=True)
        if time.perf_counter() >= stop:
            return clock, epoch + 1
    return clock, epochs


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seconds", default=math.inf, show_default=True, help="Train at most so long.")
@click.option("--epochs", default=150, show_default=True, help="Train at most so many.")
@click.option("--batch-size", default=16, show_default=True, help="The article's: 16 or 64.")
@click.option("--workers", default=4, show_default=True, help="Processes that load images.")
@click.option("--test-limit", type=int, help="Test on so many images only, evenly spread.")
@click.option("--seed", default=0, show_default=True, help="Of the split, the model, the order.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the result there."
)
def main(
    folder: Path,
    seconds: float,
    epochs: int,
    batch_size: int,
    workers: int,
    test_limit: int | None,
    seed: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Train as the article does on FOLDER/train/CLASS/*, test on FOLDER/test/CLASS/*."""
    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ArticleViT().to(device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters == N_PARAMETERS
    batches, val, test = loaders(folder, batch_size, workers, test_limit)
    start = time.perf_counter()
    clock, finished = train(model, batches, val, epochs=epochs, seconds=seconds)
    result = {
        **speed(clock, batch_size),
        "seconds": time.perf_counter() - start,  # of training and validation
        "epochs": finished,
        "steps": clock.steps,
        "test_accuracy": accuracy(model, test),
        "test_limit": test_limit,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "torch": torch.__version__,
        "n_parameters": n_parameters,
    }
    click.echo(json.dumps(result, indent=2))
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
