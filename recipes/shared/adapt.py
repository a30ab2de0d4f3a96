"""A base and options in; the base with a new head and an adapter, and later their files, out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import adapters
from recipes.shared.finetuning import CACHED_BYTES, CommonOptions
from recipes.shared.methods import default_lr
from recipes.shared.splits import say
from vitft.devices.processes import barrier, is_first
from vitft.evaluation.features import feature_bytes, n_frozen
from vitft.model.checkpoint import is_known_backbone, save_model
from vitft.model.vit import VisionTransformer
from vitft.pictures.augment import Augmentation
from vitft.training.plan import Plan
from vitft.training.run import Run


def set_framing(model: VisionTransformer, options: CommonOptions) -> None:
    """Set the model's image size and how pictures are resized and cropped, where options say so.

    Raises:
        ValueError: a value is out of its range.
    """
    if options.image_size is not None:
        model.resize(options.image_size)
        model.facts.pop("prepared_size", None)  # a size has been chosen
    elif (usual := model.facts.get("prepared_size")) is not None:
        quicker = ", in less time" * (usual < model.image_size)
        say(
            f"this base takes images of {model.image_size} pixels, but its library prepares those "
            f"of {usual}: --image-size {usual} does so{quicker}"
        )
    if options.resize is not None:
        model.framing = replace(model.framing, resize=options.resize)
    if options.crop is not None:
        model.framing = replace(model.framing, crop=options.crop)


def adapt(
    model: VisionTransformer,
    options: CommonOptions,
    config: adapters.AdapterConfig | None,
    classes: Sequence[str],
    fingerprint: str,
) -> None:
    """Give a base a new head and an adapter, in place, or those of the run that --from names.

    Args:
        model: the base.
        options: of the run; its seed draws the adapter's weights.
        config: of the adapter, None for a baseline.
        classes: names of the classes that the head tells apart.
        fingerprint: of the base without its head.

    Raises:
        ValueError, OSError: the adapter of --from is broken or another base's, --unfreeze is out of
            its range, or a forward pass leaves out an adapted module.
    """
    torch.manual_seed(options.seed)
    if options.from_ is not None and options.adapter != "full":
        preprocessing = model.preprocessing  # load_adapter sets that of the earlier run
        adapters.load_adapter(model, options.from_, train=True, fingerprint=fingerprint)
        model.preprocessing = preprocessing
    if options.from_ is None or model.classes != tuple(classes):
        model.new_head(classes)
    if options.from_ is not None:
        return
    if options.adapter != "full":
        config, trainable = unfrozen(model, options, config)
        # With blocks that train whole, the fingerprint is that of the frozen weights alone.
        known = fingerprint if trainable == ("head",) else None
        adapters.inject(model, config, trainable=trainable, fingerprint=known)
        image = model.head.weight.new_zeros(1, model.config.n_channels, *[model.image_size] * 2)
        adapters.check(model, model.normalize(image))


def unfrozen(
    model: VisionTransformer, options: CommonOptions, config: adapters.AdapterConfig | None
) -> tuple[adapters.AdapterConfig | None, tuple[str, ...]]:
    """Return the config without the blocks of --unfreeze, and the names of the trainable modules.

    Raises:
        ValueError: the model has fewer blocks.
    """
    n, n_blocks = options.unfreeze, len(model.blocks)
    if not 0 <= n <= n_blocks:
        raise ValueError(f"unfreeze={n} is not in 0 <= unfreeze <= {n_blocks}, the base's blocks")
    whole = tuple(f"blocks.{i}" for i in range(n_blocks - n, n_blocks))
    if n and config is not None and not config.layers:
        config = replace(config, layers=tuple(range(n_blocks - n)))
    norm = ("norm",) if n and config is None and [*model.norm.parameters()] else ()
    return config, ("head", *norm, *whole)


def at_full_rate(plan: Plan, model: VisionTransformer, options: CommonOptions) -> Plan:
    """Return the plan with full fine-tuning's learning rate for the blocks of --unfreeze.

    An adapter's learning rate is too high for them; a lower --lr applies to them too.
    """
    if not options.unfreeze:
        return plan
    rate = default_lr("full", known_backbone=is_known_backbone(options.base))
    _, (_, *whole) = unfrozen(model, options, None)
    factors = dict.fromkeys(whole, min(1.0, rate / plan.lr))
    return replace(plan, lr_factors={**plan.lr_factors, **factors})


def save_trained(run: Run, options: CommonOptions, folder: Path) -> dict[str, Any]:
    """Write the model or adapter that was trained, and return what summary.json says of it."""
    if options.adapter == "full":
        file = folder / "model.safetensors"
        if is_first() or options.shard:
            save_model(run.model, file)
    else:
        file = folder / "adapter_model.safetensors"
        adapters.save_adapter(run.model, folder)
    barrier()
    facts = run.model.facts
    return {
        "adapter": options.adapter,
        "feature_seconds": round(run.feature_seconds, 1),  # besides "seconds"
        "base": options.base,
        **{f"base_{key}": facts[key] for key in ("source", "licence") if facts.get(key)},
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "can_be_merged": options.adapter != "full" and adapters.mergeable(run.model),
    }


def pick_cached(model: VisionTransformer, options: CommonOptions, plan: Plan, n_images: int) -> int:
    """Return the number of frozen first stages whose output is computed once and cached.

    Args:
        model: the base with its adapter.
        options: of the run.
        plan: of the run.
        n_images: number of images whose features are cached.

    Raises:
        ValueError: --cache-features is given, and would change what is trained.
    """
    n = n_frozen(model)
    changes = {
        "there is augmentation": plan.augmentation != Augmentation(),
        "--sizes changes the images": bool(plan.sizes),
        "the embedding trains, or has dropout": not n,
    }
    why = next((reason for reason, holds in changes.items() if holds), "")
    n_bytes = n_images * feature_bytes(model, n)
    if options.cache_features is None:
        pays = n > 1 and plan.epochs > 1 and n_bytes <= CACHED_BYTES and not why
    else:
        pays = options.cache_features
        if pays and why:
            raise ValueError(f"--cache-features would change the result: {why}; leave it out")
    if pays:
        say(f"{n} of {len(model.stages())} stages are computed once, {n_bytes / 1e6:,.0f} MB")
    return n if pays else 0
