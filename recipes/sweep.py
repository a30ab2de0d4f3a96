"""Train many adapters together over one frozen base, and pick the best by validation.

`vitft sweep --adapter lora --rank 2,4,8 --lr 1e-3,3e-3 --seeds 3 --base BASE --data DATA --out DIR`
"""

import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import click
import torch

import adapters
from recipes.finetune import check_base, next_lines
from recipes.shared.adapt import set_framing
from recipes.shared.finetuning import CommonOptions, resolve
from recipes.shared.logs import logged
from recipes.shared.options import pick_device
from recipes.shared.places import output
from recipes.shared.runs import OUTPUTS, check_run, locked, start_run
from recipes.shared.splits import make_splits, open_data, say
from recipes.shared.summary import accuracy_line, finish
from recipes.sweeping.grid import GRID, SweepBase, SweepOptions, combinations
from recipes.sweeping.members import Member, chunks, make_member, train_together
from recipes.sweeping.plans import plan_text, run_on_ray, share
from vitft.command import options as cli
from vitft.devices.processes import started_by_torchrun
from vitft.files import read_json, write_bytes, write_json
from vitft.model.checkpoint import load_model
from vitft.records import record_of
from vitft.report.comparison import OF_IMAGES, course, table, text_table
from vitft.report.page import write_page
from vitft.training.saving import finish_save
from vitft.training.state import STATE

SWEEP = "sweep.json"  # the sweep's result


def sweep(options: SweepBase) -> dict[str, Any]:
    """Train every adapter, write their folders, sweep.json and report.html; return the result.

    Raises:
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with every state saved.
    """
    if started_by_torchrun():
        raise ValueError("a sweep is one process; share its runs out with --only 1/N to N/N")
    device = pick_device(options.device)
    runs = [(chosen, _resumed(given)) for chosen, given in combinations(options)]
    if options.ray:
        _check_folders(options, [given for _, given in runs])
        run_on_ray([given for _, given in runs], n_gpus=int(device.type == "cuda"))
        return sweep(replace(options, ray=False, overwrite=False, resume=True))
    if options.only is not None:
        runs = share(runs, options.only)
    made = [(chosen, *resolve(given, device)) for chosen, given in runs]
    _check_folders(options, [member for _, member, _, _ in made])
    folders = [member.out for _, member, _, _ in made]
    with ExitStack() as held:
        for folder in folders if options.only else [options.out, *folders]:
            held.enter_context(locked(Path(folder)))
        finish_save([Path(member.out) for _, member, _, _ in made if member.resume])
        base = load_model(options.base)
        set_framing(base, options)
        for *_, plan in made:
            plan.check_sizes(base)
        fingerprint = adapters.fingerprint(base, exclude=("head",))
        data = open_data(options, base)
        base.new_head(data.classes)
        base.to(device)
        seeds = sorted({member.seed for _, member, _, _ in made})
        splits = {seed: make_splits(data, replace(options, seed=seed), device) for seed in seeds}
        if not all(len(images.validation) for images in splits.values()):
            raise ValueError("a sweep picks by validation, but no class has two images; add some")
        members = [
            make_member(base, fingerprint, chosen, member, config, plan, splits)
            for chosen, member, config, plan in made
        ]
        say(f"{len(members)} runs by {options.adapter} on {members[0].splits}, on {device}")
        first, *others = chunks(base, members, options.together)
        train_together(base, first, begin=partial(_begin, options, members))
        for chunk in others:
            train_together(base, chunk)
        return _conclude(options, members)


def _check_folders(options: SweepBase, made: Sequence[CommonOptions]) -> None:
    """Check that no run replaces the base, or earlier files without --overwrite or --resume.

    Raises:
        ValueError: one would.
    """
    out = Path(options.out)
    there = [name for name in (SWEEP, *OUTPUTS) if (out / name).exists()]
    if there and not (options.overwrite or options.resume or options.only):
        raise ValueError(
            f"{out} holds {there[0]} already; use --resume, --overwrite or another --out"
        )
    for folder in (out, *(Path(member.out) for member in made)):
        check_base(options.base, folder)
    for member in made:
        check_run(member)


def _begin(options: SweepBase, members: Sequence[Member]) -> None:
    """Make the folders ready for training; with --overwrite the earlier sweep's result is removed.

    Raises:
        OSError: a folder cannot be written to.
    """
    if options.overwrite:
        for name in (SWEEP, "report.html"):
            Path(options.out, name).unlink(missing_ok=True)
    for member in members:
        start_run(member.options, member.folder)


def _resumed(member: CommonOptions) -> CommonOptions:
    """Return the options with --resume only for a run with a state; others start anew.

    A run without a state has not begun, or has failed.
    """
    has_state = Path(member.out, STATE).exists()
    resume, overwrite = member.resume and has_state, member.overwrite or member.resume > has_state
    return replace(member, resume=resume, overwrite=overwrite)


def _conclude(options: SweepBase, members: Sequence[Member]) -> dict[str, Any]:
    """Measure the best on the test split, write sweep.json and report.html; return the result.

    With --only there is no best, and neither file is written.

    Raises:
        ValueError: every adapter failed.
    """
    rows = _rows(members)
    best = best_of(rows)
    if options.only is not None:
        return {"best": None, "rows": rows, "options": asdict(options)}
    if best is None:
        raise ValueError(f"every adapter failed; {members[0].failed}")
    summaries = [_finish(m) for m in members if str(m.folder) in best["folders"]]
    found = [s["test_accuracy"] for s in summaries if s["test_accuracy"] is not None]
    best["test_accuracy"] = statistics.mean(found) if found else None
    best["n_test"] = summaries[0]["n_test"]
    result = {"best": best, "rows": rows, "options": asdict(options)}
    write_json(Path(options.out, SWEEP), result)
    make_sweep_report(Path(options.out))
    return result


def _finish(member: Member) -> dict[str, Any]:
    """Measure a member on the test split, log the figures, and return its summary."""
    run, options, folder = member.run, member.options, member.folder
    with logged(options, folder, run, is_new=False) as logs:
        summary = finish(run, member.splits, options, folder, member.facts)
        logs.end(summary)
    return summary


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of the highest validation accuracy, at equal accuracy of the lowest loss.

    None if every row has failed.
    """
    done = [row for row in rows if not row["failed"]]
    return max(done, key=lambda row: (row["val_accuracy"], -row["val_loss"]), default=None)


def _rows(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return a row for every combination, with the mean of the kept validation over its seeds."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        key = tuple(v for name, v in member.chosen.items() if name != "seed")
        groups.setdefault(key, []).append(member)
    rows = []
    for group in groups.values():
        first, failed = group[0], [member.failed for member in group if member.failed]
        last = [] if failed else [member.run.kept for member in group]
        found = [epoch["val_accuracy"] for epoch in last]
        rows.append(
            {name: value for name, value in first.chosen.items() if name != "seed"}
            | {
                "val_accuracy": statistics.mean(found) if found else None,
                "spread": statistics.stdev(found) if len(found) > 1 else None,
                "val_loss": statistics.mean(epoch["val_loss"] for epoch in last) if last else None,
                "n_validation": len(first.splits.validation),
                "n_trainable": sum(p.numel() for p in first.run.trainable.values()),
                "failed": failed[0] if failed else None,
                "folders": [str(member.folder) for member in group],
            }
        )
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    chosen = {name: "g" for name in rows[0] if name in GRID}
    figures = {"val_accuracy": OF_IMAGES, "spread": OF_IMAGES, "val_loss": ".3f"}
    return chosen | figures | {"n_trainable": ",", "test_accuracy": OF_IMAGES}


def make_sweep_report(folder: Path) -> bool:
    """Write report.html from a folder's sweep.json; return whether there is one.

    Raises:
        ValueError, OSError: it is broken, or the page cannot be written.
    """
    if not (folder / SWEEP).is_file():
        return False
    try:
        found = dict(read_json(folder / SWEEP))
        rows = record_of(list[dict[str, Any]], found["rows"], "rows", finite=False)
        options = dict(found["options"])
        best = next(row for row in rows if row["folders"] == found["best"]["folders"])
        title, n_seeds = f"{options['adapter']} on {options['data']}", len(best["folders"])
        chosen = [name for name in rows[0] if name in GRID]
        body = f"<p>{escape(_caption(best, chosen, n_seeds))}</p>" + course(
            rows,
            chosen[0] if chosen else "n_trainable",
            "val_accuracy",
            partial(_line, chosen),
            best,
        )
        body += f"<h2>Table</h2>{table(rows, _columns(rows), best)}"
    except (ValueError, TypeError, LookupError, OverflowError, StopIteration) as error:
        raise ValueError(f"{folder / SWEEP} is broken ({error}); run the sweep again") from error
    write_page(folder / "report.html", title, body)
    return True


def _line(chosen: Sequence[str], row: Mapping[str, Any]) -> str:
    """Return the label of a line in the plot: the values of all varied options but the x axis."""
    return ", ".join(f"{name} {row[name]:g}" for name in chosen[1:])


def _caption(best: Mapping[str, Any], chosen: Sequence[str], n_seeds: int) -> str:
    """Return the report's caption: what the figures are, and the best values."""
    n = best.get("n_validation")
    images = f"{n:,} validation images" if n else "the validation images"
    seeds = f"The mean over {n_seeds} seeds of accuracy" if n_seeds > 1 else "Accuracy"
    bars = "; a bar is the standard deviation over the seeds" if n_seeds > 1 else ""
    values = ", ".join(f"{name} {best[name]:g}" for name in chosen) or "the only one"
    return f"{seeds} on {images}{bars}. The best by validation: {values}."


def run(options: SweepBase) -> None:
    """Sweep, and print the table and the best; with --plan, only write the commands.

    Raises:
        ValueError, OSError: as for `sweep`.
    """
    if options.plan is not None:
        if options.only is not None or options.ray:
            flag = "--ray" if options.ray else "--only"
            raise ValueError(f"--plan writes the commands of all runs; leave out {flag}")
        runs = [given for _, given in combinations(options)]
        for given in runs:  # what none can take is told now; the base may be on other machines
            lr = 1.0 if given.lr is None else given.lr
            resolve(replace(given, lr=lr), torch.device("cpu"))
        with output(options.plan) as plan:
            write_bytes(plan, os.fsencode(plan_text(runs)))
        click.echo(f"plan            {len(runs)} commands in {shlex.quote(options.plan)}")
        return
    result = sweep(options)
    best, out = result["best"], shlex.quote(options.out)
    click.echo(text_table(result["rows"], _columns(result["rows"])))
    if best is None:
        click.echo("the best        is picked by the same command with --resume, without --only")
        return
    click.echo(f"\nbest            {shlex.quote(best['folders'][0])}")
    click.echo(f"{accuracy_line(best)} (of the best, over its seeds)")
    click.echo(f"report          {out}/report.html")
    for line in next_lines(options, best["folders"][0]):
        click.echo(line)


command = cli.command("sweep", SweepOptions, run, {"default": {}})
