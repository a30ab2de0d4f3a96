"""The options of a sweep's runs in; their adapters, trained together in chunks and saved, out."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import adapters
from recipes.shared.adapt import adapt, at_full_rate, pick_cached, save_trained
from recipes.shared.explain import explain
from recipes.shared.finetuning import CommonOptions
from recipes.shared.logs import logged
from recipes.shared.runs import saved_options
from recipes.shared.splits import Splits, say
from recipes.shared.summary import as_computed, summarise, summary_before
from recipes.shared.training import calibrate, weighted
from vitft.command.telling import complain
from vitft.model.vit import VisionTransformer
from vitft.optimizers.updates import NotFinite
from vitft.training.loop import check_runs, train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.saving import restore
from vitft.training.state import STATE


@dataclass
class Member:
    """An adapter of a sweep."""

    options: CommonOptions
    chosen: dict[str, Any]  # its values of the options that vary
    folder: Path
    splits: Splits
    run: Run
    failed: str = ""  # the reason, if it failed
    facts: dict[str, Any] = field(default_factory=dict)  # what summary.json says of its files
    summary: dict[str, Any] = field(default_factory=dict)  # as in summary.json
    before: dict[str, Any] = field(default_factory=dict)  # the same of a run finished before


def make_member(
    base: VisionTransformer,
    fingerprint: str,
    chosen: dict[str, Any],
    options: CommonOptions,
    config: adapters.AdapterConfig | None,
    plan: Plan,
    splits: Mapping[int, Splits],
) -> Member:
    """Return a member with a model and a run of its own, restored from its state with --resume.

    Args:
        base: the frozen base, which members share, on its device and with the new head.
        fingerprint: the base's, without its head.
        chosen: its values of the options that vary.
        options: all its options.
        config: the adapter's; None for a baseline.
        plan: how to train.
        splits: the images by seed.
    """
    full = options.adapter == "full"  # trains the base's weights, so each needs a copy
    model = copy.deepcopy(base) if full else adapters.shared_copy(base)
    adapt(model, options, config, base.classes, fingerprint)
    images = splits[options.seed]
    n_images = (len(images.train) + len(images.validation)) * len(splits)
    plan = replace(plan, n_cached=pick_cached(model, options, plan, n_images))
    plan = at_full_rate(plan, model, options)
    plan = weighted(plan, options, images.train, len(base.classes))
    folder, given = Path(options.out), saved_options(options)
    run = Run(model, images.train, images.validation, plan, folder, [fingerprint], given)
    member = Member(options, chosen, folder, images, run)
    if options.resume:
        restore(run)
        member.before = summary_before(run, folder)
    return member


def chunks(base: VisionTransformer, members: Sequence[Member], n: int) -> list[list[Member]]:
    """Return the members in chunks to train together: at most `n`, all at the same step.

    Members that cannot be stacked, such as full fine-tuning, are chunks of one. A resumed sweep has
    the chunks of the whole one, though a member that failed begins anew: a member's results depend,
    in rounding, on those it trains with.
    """
    single: list[list[Member]] = []
    sizes: dict[int, list[Member]] = {}  # by training images: each seed draws its own validation
    for member in members:
        try:
            adapters.together(base, [member.run.model])
        except ValueError as error:
            if not single:
                full = member.options.adapter == "full"
                say(f"one after the other: {'each trains a base of its own' if full else error}")
            single.append([member])
        else:
            sizes.setdefault(len(member.run.train), []).append(member)
    whole = [same[i : i + n] for same in sizes.values() for i in range(0, len(same), n)]
    return single + [part for chunk in whole for part in _by_progress(chunk)]


def _by_progress(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members in groups that are at the same epoch and step."""
    groups: dict[tuple[int, int], list[Member]] = {}
    for member in members:
        groups.setdefault((member.run.epoch, member.run.step), []).append(member)
    return [*groups.values()]


def train_together(
    base: VisionTransformer, members: Sequence[Member], begin: Callable[[], None] = lambda: None
) -> None:
    """Train members together, from their states if they have any, and save and log them.

    Args:
        base: the frozen base.
        members: of a chunk.
        begin: called once nothing is left that could be refused.
    """
    check_runs([member.run for member in members], partial(adapters.together, base))
    explain(members[0].run)
    with ExitStack() as held:
        logs = [
            held.enter_context(logged(m.options, m.folder, m.run, is_new=not m.options.resume))
            for m in members
        ]
        begin()
        _train(base, members)
        for member, log in zip(members, logs, strict=True):
            if member.failed:
                log.close("failed")
            else:
                log.end(member.summary)


def _train(base: VisionTransformer, members: Sequence[Member]) -> None:
    """Train members, and save those that have not failed.

    Raises:
        KeyboardInterrupt: stopped, with the states saved.
    """
    try:
        failed = train([m.run for m in members], partial(adapters.together, base))
    except NotFinite as error:
        failed = {member.run: str(error) for member in members}
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the states are saved; the same command with --resume goes on"
        ) from None
    for member in members:
        if member.run in failed:
            member.failed = failed[member.run]
            (member.folder / STATE).unlink(missing_ok=True)  # --resume starts it anew
            complain(f"{member.folder.name} failed: {member.failed}")
        else:
            calibrate(member.run, member.options)
            member.facts = save_trained(member.run, member.options, member.folder)
            member.facts |= as_computed(member.before or {"n_together": len(members)})
            member.summary = member.before or summarise(
                member.run, member.splits, member.options, member.folder, member.facts
            )
