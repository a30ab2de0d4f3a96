"""A run in; its options, figures, pictures and files at the loggers of --log out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.shared.options import TrainOptions
from recipes.shared.runs import LOG, OUTPUTS, earlier_logs, saved_options
from vitft.command.telling import complain
from vitft.devices.processes import is_first
from vitft.devices.shares import Rows
from vitft.files import read_json, write_json
from vitft.report.findings import Findings
from vitft.report.page import page_style, raster
from vitft.report.pictures import matrix
from vitft.training.loggers import LOGGERS, Logger
from vitft.training.run import Run
from vitft.training.state import NEXT, STATE

KEPT = ("config.json", *(name for name in OUTPUTS if name not in (STATE, NEXT)))  # files to log
SIDE = 4  # images in a row, and in a column, of the picture of training images


class Logs:
    """The loggers of a run. If one fails, an error is shown and the run goes on without it.

    Args:
        options: the run's options, which name the loggers.
        folder: the run's folder.
    """

    def __init__(self, options: TrainOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.loggers: dict[str, Logger] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def begin(self, run: Run, *, is_new: bool) -> None:
        """Open the loggers, and log what they do not have yet.

        Args:
            run: a new run, or one restored from its state.
            is_new: which of both. A new run replaces the logs of an earlier one in its folder, once
                its own are open.

        Raises:
            ValueError: a logger cannot be opened, or log.json is broken.
        """
        if not is_first():
            return
        earlier = earlier_logs(self.folder) if is_new else []
        self.records = self._read() if self.options.log and not is_new else {}
        for name in dict.fromkeys(self.options.log):
            try:
                logger = LOGGERS[name](self.folder, self.records.get(name, {}), run.epoch)
            except Exception as error:  # whatever the network or the package says
                raise ValueError(f"--log {name} cannot begin: {_line(error)}") from error
            self.loggers[name], self.records[name] = logger, logger.record
        for path in earlier:
            path.unlink(missing_ok=True)
        if not self.loggers:
            return
        new = [name for name, logger in self.loggers.items() if logger.is_new]
        picture = augmented(run) if new else torch.empty(0)
        for name in new:
            self._call(name, lambda logger: logger.options(saved_options(self.options)))
            self._call(name, lambda logger: logger.picture("training_images", picture))
        write_json(self.folder / LOG, self.records)
        for row in run.history:
            self.epoch(row)
        run.listeners.append(self.epoch)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl, to the loggers that do not have its epoch yet."""
        for name, logger in [*self.loggers.items()]:
            if logger.record["epoch"] < row["epoch"]:
                self._call(name, lambda logger: logger.epoch(row))
        if self.loggers:
            write_json(self.folder / LOG, self.records)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log the figures of summary.json, the confusions and the files of the run."""
        figures = {
            name: float(value)
            for name, value in summary.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        files = [self.folder / name for name in KEPT if (self.folder / name).exists()]
        for name in [*self.loggers]:
            self._call(name, self._log_confusions)
            self._call(name, lambda logger: logger.end(figures, files))

    def _log_confusions(self, logger: Logger) -> None:
        if (picture := confusions(self.folder)) is not None:
            logger.picture("confusions", picture)

    def close(self, how: str) -> None:
        """Close the loggers: the run has "finished", was "stopped" or has "failed"."""
        for name in [*self.loggers]:
            self._call(name, lambda logger: logger.close(how))
        self.loggers.clear()

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / LOG
        try:
            return dict(read_json(path)) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is broken ({error}); remove it to begin new logs") from error

    def _call(self, name: str, do: Callable[[Logger], None]) -> None:
        """Call `do` with a logger, which is dropped if it fails, or skipped if it was dropped."""
        if name not in self.loggers:
            return
        try:
            do(self.loggers[name])
        except Exception as error:  # whatever the network or the package says
            del self.loggers[name]
            complain(f"--log {name} failed, and the run goes on without it: {_line(error)}")


@contextmanager
def logged(options: TrainOptions, folder: Path, run: Run, *, is_new: bool) -> Iterator[Logs]:
    """Open the loggers of a run, as `Logs.begin` says, and close them however the run ends.

    Raises:
        ValueError: a logger cannot be opened, or log.json is broken.
    """
    logs, how = Logs(options, folder), "failed"
    try:
        logs.begin(run, is_new=is_new)
        yield logs
        how = "finished"
    except KeyboardInterrupt:
        how = "stopped"
        raise
    finally:
        logs.close(how)


def augmented(run: Run) -> Tensor:
    """Return augmented training images, as the steps take them, side by side in a square.

    The random state is left as it was, so that logging does not change the run.

    Returns:
        uint8 (3, SIDE * image_size, SIDE * image_size).
    """
    order = run.order()
    chosen = order[torch.arange(SIDE**2) % len(order)].cpu()
    images = torch.stack([run.train.decode(i) for i in chosen.tolist()]).float()
    labels = run.train.labels.cpu()[chosen]
    targets = run.plan.task.targets(labels, run.model.head.out_features)
    with torch.random.fork_rng(devices=[]):
        rows = Rows(len(images))
        images, _ = run.plan.augmentation(images, targets, run.image_size, rows)
    colours = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    squares = colours.round().clamp(0, 255).byte().unflatten(0, (SIDE, SIDE))
    return squares.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def confusions(folder: Path) -> Tensor | None:
    """Return a picture of the confusion matrix in a run's report, uint8 (3, height, width).

    None if nothing was measured, or if an image may have several labels.
    """
    try:
        found = Findings.read(folder)
    except FileNotFoundError:
        return None
    if not found.confusions:
        return None
    with page_style():
        return raster(matrix(found))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
