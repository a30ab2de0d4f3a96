"""The options of `finetune` and `sweep` in; the adapter's config and the plan out."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

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
from recipes.shared.model import BASE
from recipes.shared.options import TrainOptions, make_plan
from recipes.shared.runs import read_config, resumed_options, typed_options
from recipes.sharing.public import is_bundled
from vitft.command.options import option
from vitft.model.checkpoint import BUNDLED, find_base, is_known_backbone
from vitft.training.plan import Plan

PRESETS: dict[str, dict[str, Any]] = {"default": {}}
HEAD_STARTS = ("probe", "zeros")
FIXED = ("adapter", "base", "targets", "layers", "unfreeze")  # cannot be given with --from
CACHED_BYTES = 2**30  # most memory for cached features, unless --cache-features is given


@dataclass(frozen=True, kw_only=True)
class CommonOptions(TrainOptions):
    """The options that every method has."""

    adapter: str = option(help=f"Method: {', '.join(names())}.")
    base: str = option(help=BASE)
    preset: str = option("default", f"Values of options that are not given: {', '.join(PRESETS)}.")
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
        "How a picture becomes a square: shortest (the longer side is cut), squash, or pad.  "
        "[default: the base's]",
    )
    crop: float | None = option(
        None,
        "Share of the resized picture's side that is kept, from the middle.  [default: the base's]",
    )
    targets: tuple[str, ...] | None = option(
        None,
        "Modules to adapt: names, ends of names or regular expressions.  [default: the method's; "
        "for lora every linear of the blocks: wq,wk,wv,wo,w1,w2, and w3 if there is one]",
    )
    layers: tuple[str, ...] | None = option(
        None, "Numbers of the blocks to adapt, from 0, such as 4-5.  [default: all]"
    )
    from_: str | None = option(
        None,
        "Continue with the adapter of this run, also on new images.  Base and method stay the "
        "same, and so does the head if the classes are the same.",
    )
    unfreeze: int = option(
        0,
        "Train all weights of this many last blocks (with linear, of the last norm too), at the "
        "learning rate of full fine-tuning, or at --lr if that is lower.",
    )
    head_start: str = option(
        "probe",
        "Start of the new head: probe, a linear probe of the base's features, or zeros.",
    )
    cache_features: bool | None = option(
        None,
        "Compute the output of the frozen first blocks once and keep it.  "
        "[default: up to 1 GB, if there is no augmentation]",
    )


FinetuneOptions = make_dataclass(
    "FinetuneOptions",
    [(name, kind, field) for name, (kind, field) in method_options().items()],
    bases=(CommonOptions,),
    frozen=True,
    kw_only=True,
    namespace={
        "__doc__": "Freeze a base, add a head for the new classes, and train only that head and an "
        "adapter.\n\n\b\n" + "\n".join(["Methods:", *method_lines()])
    },
)


def resolve(
    options: CommonOptions, device: torch.device
) -> tuple[CommonOptions, adapters.AdapterConfig | None, Plan]:
    """Return the options with every default filled in, the adapter's config, and the plan.

    Raises:
        ValueError: an option's value is unknown or out of its range, or the method has no such
            option.
    """
    if options.unfreeze and options.adapter == "full":
        raise ValueError("--adapter full trains every block; leave out --unfreeze")
    if options.head_start not in HEAD_STARTS:
        known = ", ".join(HEAD_STARTS)
        raise ValueError(f"unknown head start {options.head_start!r}; choose from {known}")
    given = {name: getattr(options, name) for name in ("targets", "layers", *method_options())}
    config = make_config(options.adapter, given)
    if is_bundled(options.base) and find_base(options.base).parent != BUNDLED:
        options = replace(options, base=f"./{options.base}")  # a run's folder of the same name
    if Path(options.base).name in ("", ".."):  # a name that tells nothing elsewhere
        options = replace(options, base=str(Path(options.base).resolve()))
    if options.lr is None:
        is_known = is_known_backbone(options.base)
        options = replace(options, lr=default_lr(options.adapter, known_backbone=is_known))
    plan = replace(make_plan(options, device), probe_head=options.head_start == "probe")
    if config is not None:
        own_options = [field.name for field in fields(config) if "help" in field.metadata]
        options = replace(options, **{name: getattr(config, name) for name in own_options})
        plan = replace(plan, lr_factors=config.lr_factors())
    return options, config, plan


def recalled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that --resume or --from take from an earlier run.

    Raises:
        ValueError: the folder holds no run, or an option of the method is given with --from.
    """
    is_new = (
        given.get("from_") is not None and not Path(given.get("out", ""), "config.json").exists()
    )
    if given.get("resume") and "out" in given and not is_new:
        return resumed_options(given, FinetuneOptions)
    if given.get("from_") is None:
        return {}
    if fixed := sorted({*FIXED, *method_options()} & given.keys()):
        raise ValueError(f"--from goes on with the adapter as it is; leave out --{fixed[0]}")
    kept = {"adapter", "base", "targets", "layers", "image_size", "resize", "crop"}
    config = read_config(Path(given["from_"]), "go on with")
    found = typed_options(config, FinetuneOptions, kept | method_options().keys())
    return found | ({"base": given["from_"]} if found.get("adapter") == "full" else {})
