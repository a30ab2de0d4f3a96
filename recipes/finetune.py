"""Freeze a base, train an adapter and a new head.

`vitft finetune --adapter lora --base BASE --data DATA --out DIR`
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

import adapters
from recipes.shared.methods import (
    LR_DEFAULT,
    default_lr,
    make_config,
    method_lines,
    method_options,
    names,
)
from recipes.shared.options import TrainOptions, make_plan, pick_device
from recipes.shared.runs import check_run, locked, recall
from recipes.shared.training import accuracy_line, finish, make_splits, open_data, say, train
from vitft.command import options as cli
from vitft.command.options import option
from vitft.data.augment import Augmentation
from vitft.model.checkpoint import find_base, is_known_backbone, load_model, save_model
from vitft.model.vit import VisionTransformer
from vitft.training.features import feature_bytes, n_frozen
from vitft.training.plan import Plan
from vitft.training.run import Run

PRESETS: dict[str, dict[str, Any]] = {"default": {}}
HEAD_STARTS = ("probe", "zeros")
FIXED = ("adapter", "base", "targets", "layers", "unfreeze")  # what --from does not change
CACHED_BYTES = 2**30  # of features, unless more is asked for


@dataclass(frozen=True, kw_only=True)
class CommonOptions(TrainOptions):
    """The options that every method has."""

    adapter: str = option(help=f"Method: {', '.join(names())}.")
    base: str = option(help="A .safetensors file, a run's folder, or the name of a bundled base.")
    preset: str = option("default", f"Values for what is not given: {', '.join(PRESETS)}.")
    lr: float | None = option(None, f"Highest learning rate.  {LR_DEFAULT}")
    weight_decay: float = option(0.0, "Decoupled weight decay of matrices.")
    epochs: int = option(10, "Passes over the training images.")
    batch_size: int = option(64, "Images in a step.")
    image_size: int | None = option(
        None,
        "Side of the images, in pixels; positions are resized.  [default: the base's]",
    )
    resize: str | None = option(
        None,
        "How a picture becomes a square: shortest (the rest of it is cut off), squash, or pad.  "
        "[default: the base's]",
    )
    crop: float | None = option(
        None,
        "Share of the resized picture's side that is kept, from the middle.  [default: the base's]",
    )
    targets: tuple[str, ...] | None = option(
        None,
        "What to adapt: names, ends of names or regular expressions.  [default: the method's, "
        "every linear of the blocks for lora: wq,wk,wv,wo,w1,w2, and w3 where there is one]",
    )
    layers: tuple[str, ...] | None = option(
        None, "Numbers of the blocks to adapt, from 0, such as 4-5.  [default: all]"
    )
    from_: str | None = option(
        None,
        "Go on with the adapter of this run, on new images too: its base and method stand; "
        "so does its head where the classes are the same.",
    )
    unfreeze: int = option(
        0, "Train so many of the last blocks whole, with linear the last norm too."
    )
    head_start: str = option(
        "probe",
        "What the new head starts from: probe, a linear probe of the base's features, or zeros.",
    )
    cache_features: bool | None = option(
        None,
        "Compute once what the frozen first blocks make of the images.  "
        "[default: up to 1 GB, where there is no augmentation]",
    )


FinetuneOptions = make_dataclass(
    "FinetuneOptions",
    [(name, kind, field) for name, (kind, field) in method_options().items()],
    bases=(CommonOptions,),
    frozen=True,
    kw_only=True,
    namespace={
        "__doc__": "Freeze a base, put on a head for the new classes and train only that head and "
        "an adapter.\n\n\b\n" + "\n".join(["Methods:", *method_lines()])
    },
)


def finetune(options: CommonOptions) -> dict[str, Any]:
    """Train an adapter, write the files of the run and return its summary.

    The order is fixed: build, load, inject (which freezes), move to the device, compile, optimize.

    Raises:
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with the state saved.
    """
    device = pick_device(options.device)
    options, config, plan = resolve(options, device)
    folder = check_run(options)
    check_base(options.base, folder)
    with locked(folder):
        model = load_model(options.base)
        frame(model, options)
        fingerprint = adapters.fingerprint(model, exclude=("head",))
        data = open_data(options, model)
        adapt(model, options, config, data.classes, fingerprint)
        splits = make_splits(data, options, device)
        model.to(device)
        trained, n_all = (
            sum(p.numel() for p in ps) for ps in (_trainable(model), model.parameters())
        )
        say(
            f"{options.adapter}: {trained:,} of {n_all:,} parameters train on {splits}, on {device}"
        )
        n_images = len(splits.train) + len(splits.validation)
        if model.head.weight.any():  # it has learned already
            plan = replace(plan, probe_head=False)
        plan = replace(plan, n_cached=pick_cached(model, options, plan, n_images))
        save = partial(save_trained, options=options, folder=folder)
        run = train(model, splits, plan, options, folder, save, [fingerprint])
        return finish(run, splits, options, folder, save(run))


def frame(model: VisionTransformer, options: CommonOptions) -> None:
    """Take images of the size, resized and cut, as the options say.

    Raises:
        ValueError: a value is out of its range.
    """
    if options.image_size is not None:
        model.resize(options.image_size)
    if options.resize is not None:
        model.framing = replace(model.framing, resize=options.resize)
    if options.crop is not None:
        model.framing = replace(model.framing, crop=options.crop)


def check_base(base: str, folder: Path) -> None:
    """Check that a run in `folder` does not replace the base.

    Raises:
        ValueError: it would.
    """
    if find_base(base).parent.resolve() == folder.resolve():
        raise ValueError(
            f"{folder} holds the base, which the run would replace; choose another --out"
        )


def resolve(
    options: CommonOptions, device: torch.device
) -> tuple[CommonOptions, adapters.AdapterConfig | None, Plan]:
    """Return the options with every default in place, the adapter's config, and the plan.

    Raises:
        ValueError: an option is unknown, out of its range, or not the method's.
    """
    if options.unfreeze and options.adapter == "full":
        raise ValueError("--adapter full trains every block; leave out --unfreeze")
    if options.head_start not in HEAD_STARTS:
        known = ", ".join(HEAD_STARTS)
        raise ValueError(f"unknown head start {options.head_start!r}; choose from {known}")
    given = {name: getattr(options, name) for name in ("targets", "layers", *method_options())}
    config = make_config(options.adapter, given)
    if options.lr is None:
        is_known = is_known_backbone(options.base)
        options = replace(options, lr=default_lr(options.adapter, known_backbone=is_known))
    plan = replace(make_plan(options, device), probe_head=options.head_start == "probe")
    if config is not None:
        own = [field.name for field in fields(config) if "help" in field.metadata]
        options = replace(options, **{name: getattr(config, name) for name in own})
        plan = replace(plan, lr_factors=config.lr_factors())
    return options, config, plan


def adapt(
    model: VisionTransformer,
    options: CommonOptions,
    config: adapters.AdapterConfig | None,
    classes: Sequence[str],
    fingerprint: str,
) -> None:
    """Give a base a new head and the adapter, drawn from the seed, which a pass must reach."""
    torch.manual_seed(options.seed)
    if options.from_ is not None and options.adapter != "full":
        adapters.load_adapter(model, options.from_, train=True, fingerprint=fingerprint)
    if options.from_ is None or model.classes != tuple(classes):
        model.new_head(classes)
    if options.from_ is not None:
        return
    if options.adapter != "full":
        config, trainable = unfrozen(model, options, config)
        known = fingerprint if trainable == ("head",) else None  # else of less than all but it
        adapters.inject(model, config, trainable=trainable, fingerprint=known)
        image = model.head.weight.new_zeros(1, model.config.n_channels, *[model.image_size] * 2)
        adapters.check(model, model.normalize(image))


def unfrozen(
    model: VisionTransformer, options: CommonOptions, config: adapters.AdapterConfig | None
) -> tuple[adapters.AdapterConfig | None, tuple[str, ...]]:
    """Return the config without the blocks that train whole, and the names of what does.

    Raises:
        ValueError: there are fewer blocks.
    """
    n, n_blocks = options.unfreeze, len(model.blocks)
    if not 0 <= n <= n_blocks:
        raise ValueError(f"unfreeze={n} is not in 0 <= unfreeze <= {n_blocks}, the base's blocks")
    whole = tuple(f"blocks.{i}" for i in range(n_blocks - n, n_blocks))
    if n and config is not None and not config.layers:
        config = replace(config, layers=tuple(range(n_blocks - n)))
    norm = ("norm",) if n and config is None and [*model.norm.parameters()] else ()
    return config, ("head", *norm, *whole)


def save_trained(run: Run, options: CommonOptions, folder: Path) -> dict[str, Any]:
    """Write what was trained, and return the summary's facts about it."""
    if options.adapter == "full":
        file = folder / "model.safetensors"
        save_model(run.model, file)
    else:
        file = folder / "adapter_model.safetensors"
        adapters.save_adapter(run.model, folder)
    return {
        "adapter": options.adapter,
        "feature_seconds": round(run.feature_seconds, 1),  # besides "seconds"
        "base": options.base,
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "can_be_merged": options.adapter != "full" and adapters.mergeable(run.model),
    }


def pick_cached(model: VisionTransformer, options: CommonOptions, plan: Plan, n_images: int) -> int:
    """Return how many of the model's first stages to compute once, 0 for none.

    Raises:
        ValueError: --cache-features is given, and would change what is trained.
    """
    n, augmented = n_frozen(model), plan.augmentation != Augmentation()
    n_bytes = n_images * feature_bytes(model, n)
    if options.cache_features is None:
        pays = n > 1 and plan.epochs > 1 and n_bytes <= CACHED_BYTES and not augmented
    else:
        pays = options.cache_features
        if pays and (augmented or not n):
            why = "there is augmentation" if augmented else "the embedding trains, or has dropout"
            raise ValueError(f"--cache-features would change the result: {why}; leave it out")
    if pays:
        say(f"{n} of {len(model.stages())} stages are computed once, {n_bytes / 1e6:,.0f} MB")
    return n if pays else 0


def run_command(options: CommonOptions) -> None:
    """Train and print what a person wants to know."""
    summary = finetune(options)
    trained, n_all, out = summary["n_trainable"], summary["n_parameters"], shlex.quote(options.out)
    click.echo(accuracy_line(summary))
    click.echo(f"trained         {trained:,} of {n_all:,} parameters ({trained / n_all:.2%})")
    click.echo(f"file            {out}/{summary['file']} ({summary['file_bytes'] / 1000:,.0f} kB)")
    click.echo(f"report          {out}/report.html")
    for line in next_lines(options, options.out):
        click.echo(line)
    if summary["can_be_merged"]:
        model = _model(options, options.out)
        click.echo(f"bake it in      vitft merge {model} --out {out}/merged.safetensors")


def next_lines(options: CommonOptions, out: str) -> list[str]:
    """Return what to type next, with what was trained into `out`."""
    model = _model(options, out)
    return [
        f"evaluate it     vitft evaluate {model} --data {shlex.quote(options.data)}",
        f"use it          vitft predict {model} IMAGE",
    ]


def _model(options: CommonOptions, out: str) -> str:
    """Return the options of a command that tell the model in `out`."""
    base, out = shlex.quote(options.base), shlex.quote(out)
    full = options.adapter == "full"
    return f"--base {out}/model.safetensors" if full else f"--base {base} --adapter {out}"


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def recalled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what need not be given again: with --resume, with --from.

    Raises:
        ValueError: the folder holds no run, or an option of the method is given with --from.
    """
    if given.get("resume") and "out" in given:
        names = {field.name for field in fields(FinetuneOptions)}
        return recall(Path(given["out"]), names, "resume")
    if "from_" not in given:
        return {}
    if fixed := sorted({*FIXED, *method_options()} & given.keys()):
        raise ValueError(f"--from goes on with the adapter as it is; leave out --{fixed[0]}")
    kept = {"adapter", "base", "targets", "layers", "image_size", "resize", "crop"}
    found = recall(Path(given["from_"]), kept | method_options().keys(), "go on with")
    return found | ({"base": given["from_"]} if found.get("adapter") == "full" else {})


command = cli.command("finetune", FinetuneOptions, run_command, PRESETS, recalled)
