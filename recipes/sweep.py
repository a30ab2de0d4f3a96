"""Train many adapters together over one frozen base, and pick the best by validation.

`vitft sweep --adapter lora --rank 2,4,8 --lr 1e-3,3e-3 --seeds 3 --base BASE --data DATA --out DIR`
"""

import copy
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click

import adapters
from recipes.finetune import (
    CommonOptions,
    FinetuneOptions,
    adapt,
    method_lines,
    method_options,
    pick_cached,
    resolve,
    save_trained,
)
from recipes.options import pick_device
from recipes.runs import check_run, start_run
from recipes.training import Splits, finish, make_splits, say
from vitft import options as cli
from vitft.checkpoint import load_model
from vitft.comparison import text_table, write_comparison
from vitft.data import load_data
from vitft.files import write_json
from vitft.lockstep import Lockstep
from vitft.model import VisionTransformer
from vitft.options import option
from vitft.state import STATE
from vitft.train import Fit

# Options that may have several values: the numbers that methods take, and the learning rate.
GRID: dict[str, Any] = {
    name: kind
    for name, (hint, _) in method_options().items()
    for kind in get_args(hint)
    if kind in (int, float)
} | {"lr": float}


@dataclass(frozen=True, kw_only=True)
class SweepBase(CommonOptions):
    """The options of a sweep that are no method's."""

    lr: tuple[str, ...] = option(  # type: ignore[assignment]
        (), "Highest learning rates, with commas.  [default: 0.003]"
    )
    seeds: int = option(1, "Train each with so many seeds, from --seed.")
    together: int = option(16, "Adapters in one pass; more take more memory.")


SweepOptions = make_dataclass(
    "SweepOptions",
    [
        (name, tuple[str, ...], option((), f"Several with commas.  {field.metadata['help']}"))
        if name in GRID
        else (name, kind, field)
        for name, (kind, field) in method_options().items()
    ],
    bases=(SweepBase,),
    frozen=True,
    kw_only=True,
    namespace={
        "__doc__": "Train adapters of every combination of --lr and the method's numbers together, "
        "each as it would train alone, and pick the best by validation.\n\n\b\n"
        + "\n".join(["Methods:", *method_lines()])
    },
)


@dataclass
class Member:
    """One adapter of a sweep."""

    options: CommonOptions
    chosen: dict[str, Any]  # its values of the options that have several
    folder: Path
    splits: Splits
    fit: Fit


def combinations(options: SweepBase) -> list[tuple[dict[str, Any], CommonOptions]]:
    """Return for every adapter its values of options that have several, and all its options.

    Raises:
        ValueError: a value is no number, or nothing can be trained so.
    """
    if options.val_fraction == 0:
        raise ValueError("a sweep picks by validation; leave out --val-fraction 0")
    for name in ("seeds", "together"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is not positive")
    values = {
        name: [_number(name, text) for text in getattr(options, name)]
        for name in GRID
        if getattr(options, name)
    }
    same = {field.name for field in fields(FinetuneOptions)} - GRID.keys() - {"seed", "out"}
    common = {name: getattr(options, name) for name in same}
    made = []
    for numbers in product(*values.values()):
        for seed in range(options.seed, options.seed + options.seeds):
            own = dict(zip(values, numbers, strict=True))
            chosen = {name: own[name] for name in values if len(values[name]) > 1} | {"seed": seed}
            out = Path(options.out, ",".join(f"{name}={value}" for name, value in chosen.items()))
            made.append((chosen, FinetuneOptions(**common, **own, seed=seed, out=str(out))))
    return made


def _number(name: str, text: str) -> float:
    try:
        number: float = GRID[name](text)
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} {text!r} is no number") from None
    return number


def sweep(options: SweepBase) -> dict[str, Any]:
    """Train every adapter, write their folders, sweep.json and report.html, and return the former.

    Raises:
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with every state saved.
    """
    device = pick_device(options.device)
    base = load_model(options.base)
    data = load_data(
        options.data, image_size=base.config.image_size, n_channels=base.config.n_channels
    )
    made = [(chosen, *resolve(_resumed(given), device)) for chosen, given in combinations(options)]
    for _, own, _, _ in made:
        check_run(own)
    splits: dict[int, Splits] = {}
    members: list[Member] = []
    fingerprint = adapters.fingerprint(base)
    base.new_head(data.classes)
    base.to(device)
    for chosen, own, config, plan in made:
        if own.seed not in splits:
            splits[own.seed] = make_splits(data, own, device)
        full = own.adapter == "full"  # trains the base's own Parameters
        model = copy.deepcopy(base) if full else adapters.shared_copy(base)
        adapt(model, own, config, data.classes)
        train, validation = splits[own.seed].train, splits[own.seed].validation
        n_images = (len(train) + len(validation)) * options.seeds
        plan = replace(plan, n_cached=pick_cached(model, own, plan, n_images))
        folder = Path(own.out)
        fit = Fit(model, train, validation, plan, folder, [fingerprint])
        members.append(Member(own, chosen, folder, splits[own.seed], fit))
    say(f"{len(members)} adapters by {options.adapter} on {len(train):,} images, on {device}")
    n_together = options.together
    try:
        adapters.together(base, [members[0].fit.model])
    except ValueError as error:
        say(f"one after the other: {error}")
        n_together = 1
    for i in range(0, len(members), n_together):
        _train(base, members[i : i + n_together])
    rows = _rows(members)
    best = max(rows, key=lambda row: row["val_accuracy"])
    best["test_accuracy"] = statistics.mean(
        finish(m.fit, m.splits, m.options, m.folder, save_trained(m.fit, m.options, m.folder))[
            "test_accuracy"
        ]
        for m in members
        if str(m.folder) in best["folders"]
    )
    result = {"best": best, "rows": rows, "options": asdict(options)}
    write_json(Path(options.out, "sweep.json"), result)
    _report(options, rows)
    return result


def _resumed(own: CommonOptions) -> CommonOptions:
    """Return the options with --resume only where there is something to go on from."""
    return replace(own, resume=own.resume and Path(own.out, STATE).exists())


def _train(base: VisionTransformer, members: Sequence[Member]) -> None:
    """Train some of the adapters together, or go on, and save them."""
    fits = [member.fit for member in members]
    joint = fits[0].model  # one trains as ever
    if len(fits) > 1:
        joint = adapters.together(base, [fit.model for fit in fits])
    steps = Lockstep(fits, joint)
    if all(member.options.resume for member in members):
        steps.restore()
    else:
        for member in members:
            start_run(member.options, member.folder)
    try:
        steps.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the states are saved; the same command with --resume goes on"
        ) from None
    for member in members:
        save_trained(member.fit, member.options, member.folder)


def _rows(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return a row for every combination: the mean over its seeds of the last validation."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        key = tuple(v for name, v in member.chosen.items() if name != "seed")
        groups.setdefault(key, []).append(member)
    rows = []
    for group in groups.values():
        found = [member.fit.history[-1]["val_accuracy"] for member in group]
        first = group[0]
        rows.append(
            {name: value for name, value in first.chosen.items() if name != "seed"}
            | {
                "val_accuracy": statistics.mean(found),
                "spread": statistics.stdev(found) if len(found) > 1 else None,
                "n_trainable": sum(p.numel() for p in first.fit.trainable),
                "folders": [str(member.folder) for member in group],
            }
        )
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    chosen = {name: "g" for name in rows[0] if name in GRID}
    figures = {"val_accuracy": ".2%", "spread": ".2%", "n_trainable": ",", "test_accuracy": ".2%"}
    return chosen | figures


def _report(options: SweepBase, rows: Sequence[Mapping[str, Any]]) -> None:
    chosen = [name for name in rows[0] if name in GRID]
    x = chosen[0] if chosen else "n_trainable"
    series = chosen[1] if len(chosen) > 1 else "method"
    write_comparison(
        Path(options.out, "report.html"),
        title=f"{options.adapter} on {options.data}",
        rows=[{"method": options.adapter} | dict(row) for row in rows],
        columns=_columns(rows),
        x=x,
        y="val_accuracy",
        series=series,
    )


def run(options: SweepBase) -> None:
    """Sweep, and print the table and the best."""
    result = sweep(options)
    best, out = result["best"], shlex.quote(options.out)
    click.echo(text_table(result["rows"], _columns(result["rows"])))
    click.echo(f"\nbest            {shlex.quote(best['folders'][0])}")
    click.echo(f"test accuracy   {best['test_accuracy']:.2%} (of the best, over its seeds)")
    click.echo(f"report          {out}/report.html")


command = cli.command("sweep", SweepOptions, run, {"default": {}})
