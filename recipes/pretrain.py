"""Train a base from scratch: `vitft pretrain --data cifar10 --out runs/base`."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import click
import torch

from recipes.shared.options import TrainOptions, make_plan, pick_device
from recipes.shared.runs import check_run, continued, locked, resumed_options
from recipes.shared.splits import make_splits, open_data, say
from recipes.shared.summary import accuracy_line
from recipes.shared.training import to_device, train
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.split import channel_statistics
from vitft.devices.processes import is_first, joined
from vitft.model.checkpoint import save_model
from vitft.model.config import ViTConfig
from vitft.model.init import INITS, initialise
from vitft.model.vit import VisionTransformer
from vitft.pictures.preprocess import Framing
from vitft.training.run import Run

PRESETS: dict[str, dict[str, Any]] = {
    # Flips and shifts, for few epochs.
    "default": {},
    # For two CPU cores: most of the epochs are on small images, which cost a quarter.
    # --data cifar10 (a JPEG copy): 82.66 %, seed 0, in 92 minutes beside other work on two cores of
    # an AMD EPYC; with --epochs 7 --sizes 16:0.72,24:0.14 78.86 %, in 43 minutes.
    "cpu": {
        "epochs": 12,
        "batch_size": 256,
        "stem": "conv",
        "sizes": ("16:0.66", "24:0.17"),
    },
    # For one GPU with --compile; by the roofline a minute or so on an H100, not measured yet.
    "fast": {"epochs": 130, "batch_size": 512, "stem": "conv", "cutmix": 0.5},
    # The same for some 20 minutes; not measured yet.
    "best": {
        "epochs": 2500,
        "batch_size": 512,
        "stem": "conv",
        "cutmix": 0.5,
        "mixup": 0.3,
        "trivial": True,
    },
    # The recipe of the article that the model comes from, to compare with.
    "article": {
        "epochs": 150,
        "batch_size": 16,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "optimizer": "adam",
        "schedule": "multistep",
        "warmup": 0.0,
        "clip": 0.0,
        "dropout": 0.2,
        "label_smoothing": 0.0,
        "shift": 0,
        "min_area": 0.8,
        "pooling": "cls",
        "init": "article",
    },
}


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainOptions):
    """Train a Vision Transformer from scratch and save it as OUT/model.safetensors."""

    preset: str = option("default", f"Values of options that are not given: {', '.join(PRESETS)}.")
    lr: float | None = option(3e-3, "Highest learning rate; for adamw about a third of it.")
    optimizer: str = option("muon", "muon (slower steps, but far fewer), adamw or adam.")
    label_smoothing: float = option(0.05, "Label smoothing: probability spread over all classes.")
    flip: bool = option(
        True, "Mirror half of the training images; wrong where left and right matter, as in signs."
    )
    shift: int = option(4, "Shift training images by up to this many pixels.")
    dropout: float = option(0.0, "Of the tokens, after the positions and in the feed-forward.")
    init: str = option("mimetic", f"Initial weights: {', '.join(INITS)} (arXiv:2305.09828).")
    pooling: str = option(
        "mean", "What the head reads: mean, the mean of the tokens, or cls, the class token."
    )
    stem: str = option(
        "linear", "How patches become tokens: linear, or conv (three small convolutions)."
    )
    image_size: int = option(32, "Side of the images, in pixels.")
    resize: str = option(
        "shortest",
        "How a picture becomes a square: shortest (the longer side is cut), squash, or pad.",
    )
    patch_size: int = option(4, "Side of a patch, in pixels.")
    dim: int = option(256, "Width of a token.")
    hidden_dim: int = option(512, "Width inside a feed-forward.")
    n_heads: int = option(8, "Attention heads.")
    n_layers: int = option(6, "Blocks.")
    n_channels: int = option(3, "3 for colour, 1 for grey.")


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Train a base, write the files of the run and return its summary.

    Raises:
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with the state saved.
    """
    with joined():
        return _pretrain(continued(options))


def _pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Train a base, in a process that has joined the others."""
    device = pick_device(options.device)
    known = {field.name for field in fields(PretrainOptions)}
    names = [field.name for field in fields(ViTConfig) if field.name in known]
    config = ViTConfig(**{name: getattr(options, name) for name in names})
    plan = make_plan(options, device)
    folder = check_run(options)
    with locked(folder):
        untrained = VisionTransformer(config)  # gives the preprocessing; classes are not known yet
        plan.check_sizes(untrained)
        untrained.framing = Framing(resize=options.resize, kernel="draft-bicubic")
        data = open_data(options, untrained)
        splits = make_splits(data, options, device)
        torch.manual_seed(options.seed)
        model = VisionTransformer(replace(config, n_classes=len(data.classes)))
        model.framing, model.labels = untrained.framing, untrained.labels
        initialise(model, options.init)
        model.classes = data.classes
        model.mean, model.std = channel_statistics(splits.train)
        to_device(model, options, device)
        n_parameters = sum(p.numel() for p in model.parameters())
        say(
            f"{n_parameters:,} parameters train on {splits} "
            f"of {len(data.classes)} classes, on {device}"
        )

        def save(run: Run) -> dict[str, Any]:
            if is_first() or options.shard:
                save_model(run.model, folder / "model.safetensors")
            return {"preset": options.preset}

        return train(model, splits, plan, options, folder, save)[1]


def run(options: PretrainOptions) -> None:
    """Train and print the result."""
    summary, out = pretrain(options), shlex.quote(options.out)
    click.echo(accuracy_line(summary))
    click.echo(f"base            {out}/model.safetensors")
    click.echo(f"report          {out}/report.html")
    click.echo(f"use it          vitft finetune --adapter lora --base {out} --data DATA --out DIR")


def recalled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that --resume takes from the run, {} without --resume."""
    return resumed_options(given, PretrainOptions) if given.get("resume") and "out" in given else {}


command = cli.command("pretrain", PretrainOptions, run, PRESETS, recalled)
