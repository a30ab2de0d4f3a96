"""What `--log` tells TensorBoard, MLflow and wandb: their own readers find every epoch once."""

import io
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.shared.finetuning import FinetuneOptions
from recipes.shared.logs import augmented, logged
from recipes.shared.runs import start_run
from tests.shared import TINY, Run, drawn, long, summary
from vitft import VisionTransformer, ViTConfig
from vitft.command.telling import verbosity
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training import run as training
from vitft.training.loggers import LOGGERS, Logger, MLflow
from vitft.training.plan import Plan

pytestmark = long
FLAGS = ["--adapter=lora", "--batch-size=16", "--flip", "--mixup=0.5", "--dropout=0.1"]
OPTIONS = FinetuneOptions(adapter="lora", base="b", data="d", out="o", log=("noting",))
SWITCHES = ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True, scope="module")
def _nothing_configured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in SWITCHES:
            patch.delenv(name, raising=False)
        yield


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> Any:
    """Return what TensorBoard's own reader finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


@pytest.fixture(scope="module")
def crashed(vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that fails in its third epoch, with the state of its start."""
    out, n_steps = tmp_path_factory.mktemp("logs") / "run", iter(range(100))
    plain = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        plain(self)
        if next(n_steps) == 9:  # 4 steps an epoch
            raise ValueError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        given = ["--base", base, "--data", folder, "--out", out, "--epochs=3", *FLAGS]
        vitft("finetune", *given, "--log=tensorboard,mlflow,wandb", code=2)
    return out


@pytest.fixture(scope="module")
def failed_as(crashed: Path) -> str:
    """Return what MLflow says of the run that failed, before it goes on."""
    return str(mlflow_run(crashed)[1].info.status)


@pytest.fixture(scope="module")
def resumed(vitft: Run, crashed: Path, failed_as: str) -> Path:
    with drawn():
        vitft("finetune", "--resume", "--out", crashed)
    return crashed


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """Return MLflow's client, and the one run in its store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("vitft")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_a_resumed_run_stands_in_tensorboard_once(resumed: Path) -> None:
    for name in ("train_loss", "val_loss", "val_accuracy", "lr", "seconds"):
        expected = [(row["epoch"], pytest.approx(row[name])) for row in rows(resumed)]
        assert scalars(resumed, name) == expected
        assert len(expected) == 3
    accuracy = [(4, pytest.approx(summary(resumed)["test_accuracy"]))]
    assert scalars(resumed, "summary/test_accuracy") == accuracy
    found = events(resumed)
    (picture,) = found.Images("training_images")
    assert (picture.width, picture.height) == (32, 32)  # four by four images of 8 pixels
    (picture,) = found.Images("confusions")
    assert picture.step == 3
    drawn = np.array(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
    assert drawn[0, 0].tolist() == [255, 255, 255]
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20  # cells and letters
    assert (
        found.Tensors("files/text_summary")[0].tensor_proto.string_val[0].endswith(b"report.html")
    )


def test_options_stand_in_tensorboard(resumed: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events(resumed).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["adapter"].string_value == "lora"
    assert options["dropout"].number_value == 0.1
    assert options["log"].string_value == '["tensorboard", "mlflow", "wandb"]'
    assert "layers" not in options  # which nobody has given


def test_a_resumed_run_stands_in_mlflow_once(resumed: Path, failed_as: str) -> None:
    client, run = mlflow_run(resumed)
    assert failed_as == "FAILED"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    for name in ("train_loss", "val_accuracy", "images_per_second"):
        found = client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in found) == [1, 2, 3]
    last = rows(resumed)[-1]
    assert run.data.metrics["train_loss"] == pytest.approx(last["train_loss"])
    assert run.data.metrics["summary/test_accuracy"] == summary(resumed)["test_accuracy"]
    assert run.data.params["mixup"] == "0.5"
    assert run.data.params["log"] == '["tensorboard", "mlflow", "wandb"]'
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"training_images.png", "confusions.png", "adapter_model.safetensors"} < kept
    assert {"report.html", "summary.json", "config.json", "metrics.jsonl"} < kept
    assert "state.safetensors" not in kept


def wandb_records(folder: Path) -> Iterator[Any]:
    """Yield what wandb's files hold: blocks of 32 KiB, pieces with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, whole = path.read_bytes(), 7, b""  # after the file's own header
        while place + 7 <= len(content):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # the whole, or its last piece
                record, whole = Record.FromString(whole), b""
                yield record


def test_a_resumed_run_stands_in_wandb_once_and_waits_there_for_a_network(resumed: Path) -> None:
    assert len({path.name[-8:] for path in resumed.glob("wandb/offline-run-*")}) == 1  # its id
    records = [*wandb_records(resumed)]
    values = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in x.item}
        for x in (record.history for record in records if record.HasField("history"))
    ]
    losses = [(row["_step"], row["train_loss"]) for row in values if "train_loss" in row]
    assert losses == [(row["epoch"], pytest.approx(row["train_loss"])) for row in rows(resumed)]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]
    (artifact,) = (record.artifact for record in records if record.HasField("artifact"))
    files = {entry.path for entry in artifact.manifest.contents}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html"} < files


def test_a_log_changes_nothing_and_is_not_done_again(
    vitft: Run, resumed: Path, tmp_path: Path
) -> None:
    again = vitft("rerun", resumed, "--out", tmp_path / "again", "--quiet")
    assert again.stderr == ""
    assert "the same        to the last bit" in again.stdout
    assert not [*(tmp_path / "again").glob("events*"), *(tmp_path / "again").glob("log.json")]


def test_another_run_in_its_place_starts_a_new_log(tmp_path: Path) -> None:
    start_run(OPTIONS, tmp_path)
    (tmp_path / "log.json").write_text('{"tensorboard": {"epoch": 7}}')
    (tmp_path / "events.out.tfevents.7").write_bytes(b"")
    nobody, run = replace(OPTIONS, log=("nobody",)), new_run(tmp_path)
    with pytest.raises(ValueError, match="begin"), logged(nobody, tmp_path, run, is_new=True):
        pass
    assert len([*tmp_path.iterdir()]) == 3  # nothing is removed before the new log has begun
    with logged(replace(OPTIONS, log=()), tmp_path, run, is_new=True):
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.usefixtures("draws")
def test_a_sweep_logs_every_run_in_its_folder(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.sh"
    given = ["--base", base, "--data", folder, "--out", out, *FLAGS[:2], "--lr=1e-2,1e-9"]
    given += ["--epochs=1", "--log=tensorboard"]
    vitft("sweep", *given, "--plan", plan)
    assert plan.read_text().count("--log=tensorboard") == 2
    vitft("sweep", *given)
    tested = []
    for run in (path for path in out.iterdir() if path.is_dir()):
        assert scalars(run, "val_loss") == [(1, pytest.approx(summary(run)["val_loss"]))]
        tested.append("summary/test_accuracy" in events(run).Tags()["scalars"])
    assert sorted(tested) == [False, True]  # the best alone


def test_what_a_logger_needs_is_told_before_anything_is_read(
    vitft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--adapter=lora", "--base=cifar10", "--data=nowhere", "--out", tmp_path / "run"]
    told = vitft("finetune", *given, "--log=tensorbord", code=2).stderr
    assert told == "Error: unknown log 'tensorbord'; choose from tensorboard, wandb, mlflow\n"
    monkeypatch.setattr("vitft.training.loggers.find_spec", lambda name: None)
    for name in LOGGERS:
        told = vitft("finetune", *given, f"--log={name}", code=2).stderr
        assert told == f"Error: --log {name} needs {name}; pip install 'vitft[{name}]'\n"
    assert not (tmp_path / "run").exists()


def test_wandb_asks_nobody_for_a_key(
    vitft: Run, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.login", lambda *, prompt: prompt)
    given = ["--base", base, "--data", folder, "--out", tmp_path, "--epochs=1", *FLAGS]
    vitft("finetune", *given)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    told = vitft("finetune", *given, "--log=wandb", "--overwrite", code=2).stderr
    assert "Error: --log wandb cannot begin: there is no key; set WANDB_API_KEY" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def new_run(folder: Path, channels: int = 3, how: Augmentation | None = None) -> training.Run:
    pixels = torch.arange(20 * channels * 64).remainder(251).byte().view(20, channels, 8, 8)
    images = Images(lambda i: pixels[i], torch.arange(20) % 2)
    model = VisionTransformer(ViTConfig(**TINY, n_channels=channels, n_classes=2))
    how, rest = how or Augmentation(), {"epochs": 1, "batch_size": 4, "weight_decay": 0.0}
    return training.Run(model, images, images, Plan(**rest, lr=1e-3, augmentation=how), folder)


class Noting(Logger):
    """A logger that notes what it is told."""

    told: ClassVar[list[object]] = []

    def options(self, values: Mapping[str, Any]) -> None:
        self.told.append(values["adapter"])

    def picture(self, name: str, image: torch.Tensor) -> None:
        self.told.append(name)

    def scalars(self, figures: Mapping[str, float], epoch: int) -> None:
        raise OSError("the server is gone\nsince noon")

    def close(self, how: str) -> None:
        self.told.append(how)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return what the logger "noting" is told."""
    monkeypatch.setattr(Noting, "told", [])
    monkeypatch.setitem(LOGGERS, "noting", Noting)
    return Noting.told


@pytest.mark.parametrize(
    ("how", "error"), [("finished", None), ("stopped", KeyboardInterrupt), ("failed", OSError)]
)
def test_a_log_is_closed_however_the_run_ends(
    how: str, error: type[BaseException] | None, told: list[object], tmp_path: Path
) -> None:
    with (
        suppress(KeyboardInterrupt, OSError),
        logged(OPTIONS, tmp_path, new_run(tmp_path), is_new=False),
    ):
        if error is not None:
            raise error
    assert told == ["lora", "training_images", how]


def test_a_logger_that_fails_is_told_and_left_out(
    told: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path)
    with verbosity(quiet=True, verbose=False), logged(OPTIONS, tmp_path, run, is_new=False) as logs:
        (listen,) = run.listeners
        listen({"epoch": 1, "lr": 0.1})
        listen({"epoch": 2, "lr": 0.1})
        logs.end({})
    assert told == ["lora", "training_images"]
    assert capsys.readouterr().err == (
        "--log noting failed, and the run goes on without it: the server is gone\n"
    )


def test_what_is_known_of_an_earlier_log_may_be_broken(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text("[1")
    broken = r"log.json is broken .*; remove it to begin new logs"
    with (
        pytest.raises(ValueError, match=broken),
        logged(OPTIONS, tmp_path, new_run(tmp_path), is_new=False),
    ):
        pass


def test_only_the_first_process_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.shared.logs.is_first", lambda: False)
    options, run = replace(OPTIONS, log=("tensorboard",)), new_run(tmp_path)
    with logged(options, tmp_path, run, is_new=True) as logs:
        logs.epoch({"epoch": 1, "lr": 0.1})
    assert not [*tmp_path.iterdir()]


def test_mlflow_writes_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    (tmp_path / "run").mkdir()
    MLflow(tmp_path / "run", {}, 0).close("stopped")
    assert not [*(tmp_path / "run").iterdir()]
    (meta,) = (tmp_path / "server").glob("*/*/meta.yaml")
    assert "status: 5" in meta.read_text()  # killed


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_picture_shows_training_images_as_the_steps_see_them(
    channels: int, tmp_path: Path
) -> None:
    runs = [new_run(tmp_path, channels, how) for how in (None, Augmentation(flip=True))]
    pixels = torch.stack([runs[0].train.decode(i) for i in range(20)])
    before = torch.get_rng_state()
    picture, mirrored = map(augmented, runs)
    assert torch.equal(torch.get_rng_state(), before)
    shown = [picture[:, y : y + 8, x : x + 8] for y in range(0, 32, 8) for x in range(0, 32, 8)]
    expected = pixels[runs[0].order()[:16], :3].expand(-1, 3, -1, -1)
    assert torch.equal(torch.stack(shown), expected)
    assert not torch.equal(mirrored, picture)
