"""A run's options and metrics in; the same in TensorBoard, Weights & Biases or MLflow out.

A logger logs one run, in the run's folder unless the environment names a server or another folder.
Where a run is resumed, its log is continued. Without such environment variables no logger needs a
network.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

PROJECT = "vitft"  # the project, or experiment, of the runs in a logger with several
EVENTS = "events.out.tfevents.*"  # TensorBoard's files
MAX_CHARACTERS, MAX_PARAMS = 500, 100  # MLflow's limits: of a value, and of values in one call


class Logger:
    """The log of one run.

    Args:
        folder: of the run.
        record: the earlier logger's `record`, where the run is resumed; else {}.
        epoch: finished epochs from which the run goes on.

    Attributes:
        record: what is needed to continue the log, as JSON; `epoch` is the last one logged.
        is_new: whether there was no log of this run before.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], epoch: int) -> None:
        self.folder, self.record, self.is_new = folder, {"epoch": 0, **record}, not record

    def options(self, values: Mapping[str, Any]) -> None:
        """Log the options that the run was started with."""
        raise NotImplementedError

    def epoch(self, row: Mapping[str, float | None]) -> None:
        """Log a row of metrics.jsonl."""
        number = int(row["epoch"] or 0)
        self.scalars({k: x for k, x in row.items() if x is not None and k != "epoch"}, number)
        self.record["epoch"] = number

    def scalars(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log the metrics of an epoch."""
        raise NotImplementedError

    def picture(self, name: str, image: Tensor) -> None:
        """Log a picture, uint8 (3, height, width), with the last epoch that was logged."""
        raise NotImplementedError

    def end(self, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the metrics and files that the run ends with."""
        raise NotImplementedError

    def close(self, how: str) -> None:
        """Close the log; `how` the run ended is "finished", "stopped" or "failed"."""
        raise NotImplementedError


class TensorBoard(Logger):
    """Writes event files into the run's folder.

    Where a resumed run repeats epochs, TensorBoard drops their earlier values.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder, record, epoch)
        self.record["epoch"] = last = min(self.record["epoch"], epoch)
        self.writer = SummaryWriter(str(folder), purge_step=None if self.is_new else last + 1)

    def options(self, values: Mapping[str, Any]) -> None:
        """Log them as hyperparameters, which TensorBoard lists with the final accuracies."""
        plain = {name: value for name, value in _texts(values) if value != "null"}
        self._session(0, plain)
        self._session(1, plain)

    def scalars(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log a scalar for each metric."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def picture(self, name: str, image: Tensor) -> None:
        """Log it with the metrics of the epoch."""
        self.writer.add_image(name, image, self.record["epoch"])

    def end(self, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the metrics at the step after the last epoch, and the paths of the files."""
        step = self.record["epoch"] + 1
        for name, value in figures.items():
            self.writer.add_scalar(f"summary/{name}", value, step)
        self.writer.add_text("files", "  \n".join(str(path) for path in files), step)

    def close(self, how: str) -> None:
        """Close the event file."""
        if how == "finished":
            self._session(2, {})
        self.writer.close()

    def _session(self, part: int, values: dict[str, Any]) -> None:
        """Write part 0, 1 or 2 of hparams: the experiment, a session's start, or its end."""
        from torch.utils.tensorboard.summary import hparams

        accuracies = dict.fromkeys(("summary/val_accuracy", "summary/test_accuracy"), 0.0)
        self.writer._get_file_writer().add_summary(hparams(values, accuracies)[part])


class WeightsAndBiases(Logger):
    """Logs offline into `wandb/` of the run's folder, or to the server, as $WANDB_MODE says.

    Without $WANDB_MODE it logs to the server where $WANDB_API_KEY is set.

    Raises:
        ValueError: it is to log to the server, and there is no key.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], epoch: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        super().__init__(folder, record, epoch)
        mode, key = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_API_KEY")
        wants_server = mode == "online" or (key and not mode)
        if wants_server and not wandb.login(prompt=False):
            raise ValueError("there is no key; set WANDB_API_KEY, or WANDB_MODE=offline")
        self.record.setdefault("run", uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            dir=str(folder),
            id=self.record["run"],
            resume="allow",
            mode=None if mode or key else "offline",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def options(self, values: Mapping[str, Any]) -> None:
        """Log them as the config."""
        self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log them at the step of that number."""
        self.run.log(dict(figures), step=epoch)

    def picture(self, name: str, image: Tensor) -> None:
        """Log it with the metrics of the epoch."""
        import wandb

        self.run.log({name: wandb.Image(_pillow(image))}, step=self.record["epoch"])

    def end(self, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the metrics as the summary, and the files as an artifact."""
        import wandb

        self.run.summary.update({f"summary/{name}": value for name, value in figures.items()})
        artifact = wandb.Artifact(f"{PROJECT}-{self.record['run']}", type="model")
        for path in files:
            artifact.add_file(str(path), policy="immutable")  # without a copy
        self.run.log_artifact(artifact)

    def close(self, how: str) -> None:
        """End the run."""
        self.run.finish(exit_code=int(how != "finished"))


class MLflow(Logger):
    """Logs to $MLFLOW_TRACKING_URI, or by default into `mlruns/` of the run's folder."""

    STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, folder: Path, record: Mapping[str, Any], epoch: int) -> None:
        for name in ("ALLOW_FILE_STORE", "DISABLE_TELEMETRY", "SUPPRESS_PRINTING_URL_TO_STDOUT"):
            os.environ.setdefault(f"MLFLOW_{name}", "true")
        from mlflow import MlflowClient

        super().__init__(folder, record, epoch)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        if self.is_new:
            self.record["run"] = self._new_run()
        self.run: str = self.record["run"]
        self.client.update_run(self.run, status="RUNNING")
        logged = self.client.get_metric_history(self.run, "train_loss")
        self.record["epoch"] = max((metric.step for metric in logged), default=0)

    def _new_run(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=self.folder.resolve().name)
        return str(run.info.run_id)

    def options(self, values: Mapping[str, Any]) -> None:
        """Log them as parameters."""
        from mlflow.entities import Param

        params = [Param(name, str(value)[:MAX_CHARACTERS]) for name, value in _texts(values)]
        for i in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run, params=params[i : i + MAX_PARAMS])

    def scalars(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log them as metrics."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def picture(self, name: str, image: Tensor) -> None:
        """Log it as an artifact."""
        self.client.log_image(self.run, _pillow(image), artifact_file=f"{name}.png")

    def end(self, figures: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the metrics under `summary/`, and the files as artifacts."""
        self.scalars({f"summary/{name}": value for name, value in figures.items()}, 0)
        for path in files:
            self.client.log_artifact(self.run, str(path))

    def close(self, how: str) -> None:
        """End the run."""
        self.client.set_terminated(self.run, self.STATUS[how])


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}  # by the package that each needs


def check_loggers(names: Iterable[str]) -> None:
    """Check that there are loggers of these names, and that their packages are installed.

    Raises:
        ValueError: one is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown log {name!r}; choose from {', '.join(LOGGERS)}")
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is found without origin
            raise ValueError(f"--log {name} needs {name}; pip install 'vitft[{name}]'")


def _texts(values: Mapping[str, Any]) -> list[tuple[str, float | str]]:
    """Return names and values; a value that is neither number nor text becomes JSON."""
    plain = (bool, int, float, str)
    return [(k, v if isinstance(v, plain) else json.dumps(v)) for k, v in values.items()]


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
