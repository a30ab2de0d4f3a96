"""A run in; its saved state out, and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from vitft.devices.processes import add_up, is_first
from vitft.files import read_metadata
from vitft.records import record_of
from vitft.training.finite import check_finite
from vitft.training.run import Run
from vitft.training.state import NEXT, STATE, load_state, save_state

Count = Annotated[int, msgspec.Meta(ge=0)]
Row = dict[str, int | float | None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a saved run; see the attributes of `Run`."""

    epoch: Count
    step: Count
    seconds: float
    history: list[Row]
    totals: tuple[float, float, float]
    belongs: list[str]
    # states of earlier versions lack the following
    best: Row | None = None
    frozen: dict[str, float] = field(default_factory=dict)
    skipped: Count = 0
    options: dict[str, Any] = field(default_factory=dict)
    contents: list[str] | None = None
    planned: list[Count] = field(default_factory=list)
    save: str | None = None  # name that all runs saved together have in common; see `save`


def save(run: Run, name: str | None = None) -> None:
    """Write what `restore` needs, whole or not at all; never a state that is not finite.

    Every process calls it, and the first one writes.

    Args:
        name: common to several runs that are saved together. The state then goes into a second
            file, until `confirm` is called once all are written.

    Raises:
        NotFinite: a step, the loss or a weight is not finite; the earlier state stays.
        OSError: the folder cannot be written to.
    """
    add_up(run.totals)
    check_finite(run)
    progress = Progress(
        epoch=run.epoch,
        step=run.step,
        seconds=run.seconds,
        history=run.history,
        totals=(*run.totals.tolist(),),
        belongs=run.belongs,
        contents=run.contents,
        planned=run.planned,
        best=run.best.row,
        frozen=run.frozen,
        skipped=run.skipped,
        options=run.options,
        save=name,
    )
    path, optimizers = run.folder / (NEXT if name else STATE), run.updates.optimizers
    kept = {"best": run.best.weights, "average": run.average.values}
    save_state(path, run.model, optimizers, run.draws, asdict(progress), kept)
    run.totals *= is_first()  # the first process has the sums now, so that none counts twice


def confirm(run: Run) -> None:
    """Put the state that was saved under a name in place of the earlier one."""
    (run.folder / NEXT).replace(run.folder / STATE)


def restore(run: Run) -> None:
    """Restore the state that was saved last.

    Raises:
        FileNotFoundError: nothing was saved.
        ValueError: the saved state is broken, or belongs to another model, base or data set.
    """
    path = run.folder / STATE
    progress, run.draws, kept = load_state(path, run.model, run.updates.optimizers, run.device)
    try:
        found = record_of(Progress, progress, "its progress", finite=False)
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); start again with --overwrite") from error
    if found.belongs != run.belongs:
        raise ValueError(
            f"the run in {run.folder} was started on other images, classes or another base; "
            "put them back, or start again with --overwrite"
        )
    if found.contents not in (None, run.contents):
        raise ValueError(
            f"image files have changed since the run in {run.folder} was started; put them back, "
            "or start again with --overwrite"
        )
    run.best.weights, run.average.values = kept["best"], kept["average"]
    run.totals.copy_(torch.tensor(found.totals) * is_first())
    run.epoch, run.step, run.seconds = found.epoch, found.step, found.seconds
    run.planned = found.planned + run.planned * (found.planned[-1:] != run.planned)
    run.history, run.best.row = found.history, found.best
    run.frozen, run.skipped = found.frozen, found.skipped
    run.updates.steps.restart(run.step)


def finish_save(folders: Sequence[Path]) -> None:
    """Finish a save of several runs whose process was killed before all had their new STATE.

    All of them then resume from one step. A NEXT whose save no STATE has was written by a process
    that was killed before all were written: it is removed.

    Raises:
        ValueError: a file is broken.
    """
    paths = [folder / STATE for folder in folders]
    saves = [read_metadata(path).get("save") for path in paths if path.is_file()]
    for folder in folders:
        path = folder / NEXT
        if path.is_file() and read_metadata(path).get("save", "") in saves:
            path.replace(folder / STATE)
        path.unlink(missing_ok=True)
