"""Tiny runs that one process or several train, for the tests of several processes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters
from adapters import METHODS
from tests.shared import TINY
from vitft.devices.spread import shard, whole
from vitft.model.checkpoint import save_model
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore

CPU = torch.device("cpu")
MIXED = Augmentation(
    flip=True, shift=1, min_area=0.5, trivial=True, erase=0.5, mixup=0.3, cutmix=0.3
)
RANDOM = Augmentation(rand=True, mixup=1.0)
LORA = adapters.LoRAConfig(rank=2, alpha=4, dropout=0.2, targets=("wq", "wv"))

# name -> adapter, dropout of the base, whether images are held, options of the plan
CASES: dict[str, tuple[adapters.AdapterConfig | None, float, bool, dict[str, Any]]] = {
    "pretrained": (None, 0.2, True, {"augmentation": MIXED, "label_smoothing": 0.1}),
    "pretrained with muon": (None, 0.0, True, {"optimizer": "muon", "augmentation": RANDOM}),
    "lora, streamed": (LORA, 0.1, False, {"augmentation": MIXED, "ema": 0.9}),
    "dora, in parts": (adapters.DoRAConfig(rank=2, dropout=0.2), 0.1, True, {"accumulate": 2}),
    "full, blocks again": (None, 0.1, True, {"checkpoint_blocks": True}),
    "lora on features": (
        adapters.LoRAConfig(rank=2, layers=(1,)),
        0.0,
        True,
        {"n_cached": 2, "probe_head": True, "keep": "best", "sample": "balanced"},
    ),
    "ssf": (adapters.SSFConfig(), 0.0, True, {"patience": 1, "keep": "best"}),
}
SHARDED = {name: (kind(), 0.0, True, {"keep": "best"}) for name, kind in METHODS.items()}
SHARDED |= {"full": (None, 0.1, True, {"ema": 0.9, "augmentation": MIXED})}
SHARDED |= {"full, in parts": (None, 0.1, True, {"accumulate": 2})}
SHARDED |= {"full, blocks again": (None, 0.1, True, {"checkpoint_blocks": True})}


def images(n: int, seed: int) -> Images:
    """Return n images of two classes, of which one is a bit brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    pixels = torch.randint(0, 200, (n, 3, 8, 8), generator=generator)
    pixels = (pixels + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return Images(pixels.__getitem__, labels)


def new_run(name: str, folder: Path, *, sharded: bool = False) -> Run:
    """Return a run on 37 images in batches of 8, in float64."""
    config, dropout, held, options = (CASES | SHARDED)[name]
    torch.manual_seed(1)
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=dropout)).double()
    if config is not None:
        adapters.inject(model, config, trainable=("head",))
    plan = Plan(
        **{"epochs": 3, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.0, "seed": 3} | options
    )
    folder.mkdir(exist_ok=True)
    if sharded:
        shard(model, model.blocks, methods=("run",))
    sets = images(37, 1), images(11, 2)
    if held:
        sets = sets[0].to(CPU), sets[1].to(CPU)
    return Run(model, *sets, plan, folder)


def result(run: Run) -> dict[str, Tensor]:
    """Return what a run ends with: every weight, and the figures of its epochs."""
    found = {name: whole(value).clone() for name, value in run.model.state_dict().items()}
    keys = ("train_loss", "val_loss", "val_accuracy")
    figures = [[row[key] for key in keys] for row in run.history]
    return found | {"figures": torch.tensor(figures, dtype=torch.float64)}


def alone(name: str, folder: Path) -> dict[str, Tensor]:
    """Train in this process, and return what the run ends with."""
    run = new_run(name, folder)
    train(run)
    return result(run)


def train_shared(name: str, folder: Path) -> None:
    """Train as one of several processes; each writes what it ends with."""
    run = new_run(name, folder)
    train(run)
    save_file(result(run), folder / f"result-{dist.get_rank()}.safetensors")


def train_sharded(name: str, folder: Path) -> None:
    """Train a model that is spread over the processes, save it and go on with it."""
    run = new_run(name, folder, sharded=True)
    train(run)
    values = result(run)
    assert type(run.trainable["head.weight"]).__name__ == "DTensor"
    if name.startswith("full"):
        save_model(run.model, folder / "model.safetensors")
    else:
        adapters.save_adapter(run.model, folder)
    save_file(values, folder / f"result-{dist.get_rank()}.safetensors")
    again = new_run(name, folder, sharded=True)
    restore(again)
    again.use_kept_weights()
    for key, value in run.trainable.items():
        assert torch.equal(whole(again.trainable[key]), whole(value)), key
    states = [state for o in again.updates.optimizers for state in o.state.values()]
    assert all(type(state["exp_avg"]).__name__ == "DTensor" for state in states)


def in_turn(do: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call `do` with each of the arguments."""
    for some in arguments:
        do(*some)


def results(folder: Path) -> list[dict[str, Tensor]]:
    """Return what every process ended with."""
    return [load_file(path) for path in sorted(folder.glob("result-*.safetensors"))]
