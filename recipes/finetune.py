"""Freeze a base, train an adapter and a new head.

`vitft finetune --adapter lora --base BASE --data DATA --out DIR`
"""

import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

import adapters
from recipes.shared.adapt import adapt, at_full_rate, pick_cached, save_trained, set_framing
from recipes.shared.finetuning import (
    PRESETS,
    CommonOptions,
    FinetuneOptions,
    recalled,
    resolve,
)
from recipes.shared.options import pick_device
from recipes.shared.runs import check_run, continued, locked
from recipes.shared.splits import make_splits, open_data, say
from recipes.shared.summary import accuracy_line
from recipes.shared.training import to_device, train
from vitft.command import options as cli
from vitft.command.telling import logger
from vitft.devices.processes import joined
from vitft.hub import is_name
from vitft.model.checkpoint import find_base, load_model
from vitft.model.vit import VisionTransformer


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tuning.

    Attributes:
        model: with its adapter, ready for evaluation.
        history: a row for each epoch, as in metrics.jsonl.
        summary: the content of summary.json.
    """

    model: VisionTransformer
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def finetune(**given: Any) -> Finetuned:
    """Fine-tune as `vitft finetune` does, from Python: `vitft.finetune(adapter="lora", ...)`.

    Args:
        given: the options of the command, with underscores; `from_` for `--from`.

    Raises:
        TypeError: an option is unknown or missing.
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with the state saved.
    """
    return train_adapter(FinetuneOptions(**recalled(given) | given))


def train_adapter(options: CommonOptions) -> Finetuned:
    """Train an adapter, write the files of the run, and return the model, history and summary.

    The order is fixed: build, load, inject (which freezes), move to the device, compile, optimize.

    Raises:
        ValueError, OSError: what the user can mend.
        KeyboardInterrupt: stopped, with the state saved.
    """
    with joined():
        return _train_adapter(continued(options))


def _train_adapter(options: CommonOptions) -> Finetuned:
    """Train an adapter, in a process that has joined the others.

    Raises:
        ValueError, OSError, KeyboardInterrupt: as for `train_adapter`.
    """
    device = pick_device(options.device)
    options, config, plan = resolve(options, device)
    logger.debug("adapter: %s", config)
    folder = check_run(options)
    check_base(options.base, folder)
    if options.from_ is not None and Path(options.from_).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the run to go on with; choose another --out")
    with locked(folder):
        model = load_model(options.base)
        set_framing(model, options)
        plan.check_sizes(model)
        fingerprint = adapters.fingerprint(model, exclude=("head",))
        data = open_data(options, model)
        adapt(model, options, config, data.classes, fingerprint)
        splits = make_splits(data, options, device)
        to_device(model, options, device)
        trained, n_all = (
            sum(p.numel() for p in ps) for ps in (_trainable(model), model.parameters())
        )
        say(
            f"{options.adapter}: {trained:,} of {n_all:,} parameters train on {splits}, on {device}"
        )
        n_images = len(splits.train) + len(splits.validation)
        plan = at_full_rate(plan, model, options)
        if model.has_head:  # it is trained already, so a linear probe would undo that
            plan = replace(plan, probe_head=False)
        plan = replace(plan, n_cached=pick_cached(model, options, plan, n_images))
        save = partial(save_trained, options=options, folder=folder)
        run, summary = train(model, splits, plan, options, folder, save, [fingerprint])
        return Finetuned(model.eval(), run.history, summary)


def check_base(base: str, folder: Path) -> None:
    """Check that a run in `folder` does not replace the base.

    Raises:
        ValueError: it would.
    """
    if not is_name(base) and find_base(base).parent.resolve() == folder.resolve():
        raise ValueError(
            f"{folder} holds the base, which the run would replace; choose another --out"
        )


def run_command(options: CommonOptions) -> None:
    """Train and print the result."""
    summary = train_adapter(options).summary
    trained, n_all, out = summary["n_trainable"], summary["n_parameters"], shlex.quote(options.out)
    click.echo(accuracy_line(summary))
    if summary["kept_epoch"] == 0:
        click.echo(
            "kept            the linear probe at the start: no epoch was better by validation"
        )
    click.echo(f"trained         {trained:,} of {n_all:,} parameters ({trained / n_all:.2%})")
    click.echo(f"file            {out}/{summary['file']} ({summary['file_bytes'] / 1000:,.0f} kB)")
    if summary["peak_memory_mb"]:
        click.echo(f"memory          {summary['peak_memory_mb']:,} MB at most")
    click.echo(f"report          {out}/report.html")
    for line in next_lines(options, options.out):
        click.echo(line)
    if summary["can_be_merged"]:
        model = _model(options, options.out)
        click.echo(f"bake it in      vitft merge {model} --out {out}/merged.safetensors")


def next_lines(options: CommonOptions, out: str) -> list[str]:
    """Return the commands that use the model or adapter in `out`."""
    model = _model(options, out)
    return [
        f"evaluate it     vitft evaluate {model} --data {shlex.quote(options.data)}",
        f"use it          vitft predict {model} IMAGE",
    ]


def _model(options: CommonOptions, out: str) -> str:
    """Return the options of a command that name the model in `out`."""
    base, out = shlex.quote(options.base), shlex.quote(out)
    full = options.adapter == "full"
    return f"--base {out}/model.safetensors" if full else f"--base {base} --adapter {out}"


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


command = cli.command("finetune", FinetuneOptions, run_command, PRESETS, recalled)


class _Called(ModuleType):
    """This module, which people call: `recipes.finetune(adapter="lora", ...)`."""

    def __call__(self, **given: Any) -> Finetuned:
        return finetune(**given)


sys.modules[__name__].__class__ = _Called
