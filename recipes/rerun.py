"""Repeat a run with the options in its folder, and compare the weights.

`vitft rerun runs/signs`
"""

import json
import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch

from adapters.folder import TENSORS, read_adapter
from recipes.finetune import train_adapter
from recipes.pretrain import PretrainOptions, pretrain
from recipes.shared.finetuning import FinetuneOptions
from recipes.shared.runs import read_config, typed_options
from vitft.command import options as cli
from vitft.command.options import option
from vitft.files import read_json, read_metadata, read_tensors
from vitft.records import part_of

PURPOSE = "do again"
FIGURES = ("test_accuracy", "val_accuracy")


@dataclass(frozen=True, kw_only=True)
class RerunOptions:
    """Repeat the run in DIR, with its options, data and seed, and compare the weights.

    On the same machine with the same versions they are the same to the last bit; elsewhere, and in
    another number of processes, rounding may differ.
    """

    dir: str = option(help="A finished run's folder.", argument=True)
    out: str | None = option(None, "Folder of the second run.  [default: DIR-again]")
    overwrite: bool = option(False, "Replace the run in --out.")
    json: bool = option(False, "Print JSON.")


@dataclass(frozen=True, kw_only=True)
class Before:
    """The fields of the first run's summary.json that are needed."""

    versions: dict[str, str]
    file: str = "model.safetensors"
    test_accuracy: float | None = None
    val_accuracy: float | None = None
    device: str | None = None
    n_processes: int | None = None  # an older vitft did not say
    stopped: str | None = None


def rerun(options: RerunOptions) -> dict[str, Any]:
    """Repeat a run; return the results of both, and the largest difference of their weights.

    Raises:
        ValueError, OSError: the folder holds no finished run, its data, base or weights are gone,
            or the second run would replace it.
    """
    folder = Path(options.dir)
    before = _summary(folder)
    # "." and ".." are no names to append to
    named = folder if folder.name not in ("", "..") else folder.resolve()
    out = options.out or f"{named}-again"
    if Path(out).resolve() == folder.resolve():
        raise ValueError(f"{out} holds the run itself; choose another --out")
    config = read_config(folder, PURPOSE)
    kind = FinetuneOptions if "adapter" in config else PretrainOptions
    given = typed_options(config, kind) | {"out": out, "overwrite": options.overwrite, "log": ()}
    if lacks := [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]:
        raise ValueError(f"the run in {folder} is broken: config.json lacks {lacks[0]}")
    read_metadata(folder / before.file)  # if it is broken, that is told before the second run
    if kind is PretrainOptions:
        after = pretrain(PretrainOptions(**given))
    else:
        after = train_adapter(FinetuneOptions(**given)).summary
    name = before.file
    adapted = (folder, out) if name == TENSORS else ()
    bases = {read_adapter(place).fingerprint for place in adapted}
    weights = [read_tensors(Path(place, name))[0] for place in (folder, out)]
    if weights[0].keys() != weights[1].keys():
        raise ValueError(f"{folder}/{name} has been changed since: it holds other tensors")
    distances = {key: _distance(value, weights[1][key]) for key, value in weights[0].items()}
    return {
        "same": all(torch.equal(value, weights[1][key]) for key, value in weights[0].items()),
        "n_tensors": len(distances),
        "largest_difference": max(distances.values()),
        **{key: [getattr(before, key), after.get(key)] for key in FIGURES},
        "versions_differ": [
            key for key, value in before.versions.items() if after["versions"].get(key) != value
        ],
        "devices": [before.device, after["device"]],
        "n_processes": [before.n_processes, after["n_processes"]],
        "base_differs": len(bases) > 1,
        "out": str(out),
    }


def _summary(folder: Path) -> Before:
    """Return what a finished run's summary.json says.

    Raises:
        ValueError: there is none, it is broken, or the run was stopped.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(f"there is no run to {PURPOSE} in {folder}: it has no summary.json")
    try:
        found = part_of(Before, read_json(path), path.name)
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error})") from error
    if found.stopped is not None:
        raise ValueError(f"the run in {folder} was stopped {found.stopped}; --resume it first")
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def run(options: RerunOptions) -> None:
    """Repeat the run, and print whether it is the same."""
    found = rerun(options)
    if options.json:
        click.echo(json.dumps(found))
        return
    if found["same"]:
        click.echo(f"the same        to the last bit, {found['n_tensors']} tensors")
    else:
        click.echo(f"not the same    largest difference {found['largest_difference']:.2g}")
    for key in FIGURES:
        then, now = found[key]
        if then is not None and now is not None:
            click.echo(f"{key.replace('_', ' '):<15} {then:.2%} then, {now:.2%} now")
    if found["base_differs"]:
        click.echo("another base    than the run's is in its place")
    if found["versions_differ"]:
        click.echo(f"other versions  of {', '.join(found['versions_differ'])}")
    if len(set(found["devices"])) > 1:
        click.echo(f"other devices   {found['devices'][0]} then, {found['devices'][1]} now")
    then, now = found["n_processes"]
    if then not in (None, now):
        click.echo(f"other processes {then} then, {now} now; torchrun starts as many")
    click.echo(f"second run      {shlex.quote(found['out'])}")


command = cli.command("rerun", RerunOptions, run)
