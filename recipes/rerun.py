"""Repeat a run with the options in its folder, and compare the weights.

`vitft rerun runs/signs`
"""

import json
import shlex
from dataclasses import MISSING, dataclass, field, fields
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
from vitft.training.state import STATE

PURPOSE = "do again"
FIGURES = ("test_accuracy", "val_accuracy")


@dataclass(frozen=True, kw_only=True)
class RerunOptions:
    """Repeat the run in DIR, with its options, data and seed, and compare the weights.

    On the same machine with the same versions they are the same to the last bit; elsewhere, in
    another number of processes, and without the others of a sweep, rounding may differ.
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
    n_together: int = 1  # adapters that a sweep trained in one pass
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The fields of a state that are needed; an older vitft lacked all but the first."""

    belongs: list[str]
    contents: list[str] | None = None
    planned: list[int] = field(default_factory=list)


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
    adapted = (folder, Path(out)) if before.file == TENSORS else ()
    bases = {read_adapter(place).fingerprint for place in adapted}
    was, now = (_stated(place, kind) for place in (folder, Path(out)))
    differs = {
        key: key in was and was[key] != now.get(key) for key in ("images", "contents", "base")
    }
    return {
        **_compared(folder / before.file, Path(out, before.file)),
        **{key: [getattr(before, key), after.get(key)] for key in FIGURES},
        "versions_differ": [
            key for key, value in before.versions.items() if after["versions"].get(key) != value
        ],
        "devices": [before.device, after["device"]],
        "n_processes": [before.n_processes, after["n_processes"]],
        "n_together": before.n_together,
        "planned_epochs": was.get("planned", []),
        "images_differ": differs["images"] or differs["contents"],
        "base_differs": len(bases) > 1 or differs["base"],
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


def _stated(folder: Path, kind: type[Any]) -> dict[str, list[Any]]:
    """Return what a run's state says of its images, base and epochs; {} without a state."""
    try:
        state = part_of(Stated, read_metadata(folder / STATE), STATE)
    except (OSError, ValueError):  # only the reason of a difference is then not known
        return {}
    n = len(state.belongs) - (kind is FinetuneOptions)  # the last is the base's fingerprint
    known: dict[str, list[Any]] = {
        "images": state.belongs[:n],
        "base": state.belongs[n:],
        "planned": state.planned,
    }
    return known if state.contents is None else known | {"contents": state.contents}


def _compared(first: Path, second: Path) -> dict[str, Any]:
    """Return whether the tensors of two files are the same, how many, and their difference."""
    before, after = (read_tensors(path)[0] for path in (first, second))
    if before.keys() != after.keys():
        raise ValueError(f"{first} has been changed since: it holds other tensors")
    return {
        "same": all(torch.equal(value, after[key]) for key, value in before.items()),
        "n_tensors": len(before),
        "largest_difference": max(_distance(value, after[key]) for key, value in before.items()),
    }


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
    if found["images_differ"]:
        click.echo("other images    than the run's: some were added, removed, moved or changed")
    if found["base_differs"]:
        click.echo("another base    than the run's is in its place")
    if found["versions_differ"]:
        click.echo(f"other versions  of {', '.join(found['versions_differ'])}")
    if len(set(found["devices"])) > 1:
        click.echo(f"other devices   {found['devices'][0]} then, {found['devices'][1]} now")
    if (others := found["n_together"] - 1) > 0:
        click.echo(f"other adapters  {others} trained in the same pass then, none now")
    if len(planned := found["planned_epochs"]) > 1:
        click.echo(
            f"other epochs    {', then '.join(map(str, planned))} were planned then, by "
            "--resume, and with them other learning rates"
        )
    then, now = found["n_processes"]
    if then not in (None, now):
        click.echo(f"other processes {then} then, {now} now; torchrun starts as many")
    click.echo(f"second run      {shlex.quote(found['out'])}")


command = cli.command("rerun", RerunOptions, run)
