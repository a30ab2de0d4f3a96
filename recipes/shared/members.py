"""The adapters of a sweep: made, put into chunks that train together, trained and saved."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import adapters
from recipes.finetune import CommonOptions, adapt, pick_cached, save_trained
from recipes.shared.training import Splits, say, summarise
from vitft.model.vit import VisionTransformer
from vitft.training.lockstep import Lockstep
from vitft.training.loop import Fit
from vitft.training.plan import Plan


@dataclass
class Member:
    """One adapter of a sweep."""

    options: CommonOptions
    chosen: dict[str, Any]  # its values of the options that have several
    folder: Path
    splits: Splits
    fit: Fit
    failed: str = ""  # why, if it did
    facts: dict[str, Any] = field(default_factory=dict)  # about what it saved


def make_member(
    base: VisionTransformer,
    fingerprint: str,
    chosen: dict[str, Any],
    own: CommonOptions,
    config: adapters.AdapterConfig | None,
    plan: Plan,
    splits: Mapping[int, Splits],
) -> Member:
    """Return one adapter, ready to train or to go on."""
    full = own.adapter == "full"  # trains the base's own Parameters
    model = copy.deepcopy(base) if full else adapters.shared_copy(base)
    adapt(model, own, config, base.classes)
    images = splits[own.seed]
    n_images = (len(images.train) + len(images.validation)) * len(splits)
    plan = replace(plan, n_cached=pick_cached(model, own, plan, n_images))
    fit = Fit(model, images.train, images.validation, plan, Path(own.out), [fingerprint])
    if own.resume:
        fit.restore()
    return Member(own, chosen, Path(own.out), images, fit)


def chunks(base: VisionTransformer, members: Sequence[Member], n: int) -> list[list[Member]]:
    """Return what trains together: at most `n`, at the same place, and only what can be stacked."""
    alone: list[list[Member]] = []
    places: dict[tuple[int, ...], list[Member]] = {}
    for member in members:
        try:
            adapters.together(base, [member.fit.model])
        except ValueError as error:
            if not alone:
                full = member.options.adapter == "full"
                say(f"one after the other: {'each trains a base of its own' if full else error}")
            alone.append([member])
        else:
            places.setdefault(_place(member.fit), []).append(member)
    return alone + [same[i : i + n] for same in places.values() for i in range(0, len(same), n)]


def _place(fit: Fit) -> tuple[int, ...]:
    """Return what runs must have in common to take their steps together; seeds split otherwise."""
    return fit.epoch, fit.step, fit.steps_per_epoch, min(fit.plan.batch_size, len(fit.train))


def train_together(base: VisionTransformer, members: Sequence[Member]) -> None:
    """Train some of the adapters together, or go on, and save them."""

    def join(models: list[VisionTransformer]) -> VisionTransformer:
        return models[0] if len(models) == 1 else adapters.together(base, models)

    steps = Lockstep([member.fit for member in members], join)
    try:
        steps.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the states are saved; the same command with --resume goes on"
        ) from None
    except ValueError:
        if not steps.failed:
            raise
    for i, member in enumerate(members):
        if i in steps.failed:
            member.failed = steps.failed[i]
            say(f"{member.folder.name} failed: {member.failed}")
        else:
            member.facts = save_trained(member.fit, member.options, member.folder)
            summarise(member.fit, member.splits, member.options, member.folder, member.facts)
