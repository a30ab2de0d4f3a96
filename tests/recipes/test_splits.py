"""Sets without a test split, split by nobody, or with broken pictures: what comes of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from recipes.pretrain import PretrainOptions
from recipes.shared.splits import kept_side, make_splits
from tests.shared import Run, paint, summary
from vitft.data.load import load_data
from vitft.pictures.preprocess import Fit

FLAGS = ["--adapter=linear", "--epochs=2", "--batch-size=8"]


@pytest.fixture
def colours(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder of colours, to spoil."""
    shutil.copytree(folder, tmp_path / "colours")
    return tmp_path / "colours"


def test_without_a_test_split_the_validation_figure_is_told(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    (colours / "test").rename(colours / "valid")
    out = tmp_path / "out"
    done = vitft("finetune", "--base", base, "--data", colours, "--out", out, *FLAGS)
    told = summary(out)
    assert (told["test_accuracy"], told["n_test"]) == (None, 0)
    assert (told["n_train"], told["n_validation"]) == (60, 12)
    assert done.stdout.startswith(f"validation accuracy {told['val_accuracy']:.2%}\n")
    assert "12 validation images" in (out / "report.html").read_text()
    measured = vitft("evaluate", "--base", base, "--adapter", out, "--data", colours).stdout
    assert f"validation accuracy {told['val_accuracy']:.2%} of 12 images" in measured
    refused = vitft(
        "finetune", "--base", base, "--data", colours, "--out", tmp_path / "x", *FLAGS,
        "--val-fraction=0.2", code=2,
    )  # fmt: skip
    assert "has a validation split, so --val-fraction has nothing to do" in refused.stderr


def test_nothing_held_out_is_nothing_measured(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    shutil.rmtree(colours / "test")
    flags = ["--base", base, "--data", colours, "--out", tmp_path / "out", "--val-fraction=0"]
    done = vitft("finetune", *flags, *FLAGS)
    assert done.stdout.startswith("accuracy        not measured: no image is held out")
    refused = vitft("evaluate", "--base", base, "--data", colours, code=2)
    assert "has neither test nor validation images" in refused.stderr


def test_classes_alone_are_split_and_measured_on_the_same_images(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    data, out = colours / "train", tmp_path / "out"
    done = vitft("finetune", "--base", base, "--data", data, "--out", out, *FLAGS)
    assert "these images have no splits: 12 of 60 are held out as the test split" in done.stderr
    told = summary(out)
    assert (told["n_train"], told["n_validation"], told["n_test"]) == (42, 6, 12)
    measured = vitft("evaluate", "--base", base, "--adapter", out, "--data", data).stdout
    assert f"test accuracy   {told['test_accuracy']:.2%} of 12 images" in measured
    flags = ["--base", base, "--adapter", out, "--data", data, "--test-fraction=1"]
    assert "of 60 images" in vitft("evaluate", *flags).stdout


def test_broken_pictures_stop_a_run_once_or_are_left_out(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    for name in ("train/red/003.png", "train/blue/007.png", "test/red/001.png"):
        (colours / name).write_bytes(b"\x89PNG no more")
    flags = ["--base", base, "--data", colours, "--out", tmp_path / "out", *FLAGS]
    refused = vitft("finetune", *flags, "--val-fraction=0", code=2)
    assert "2 of 60 images are broken" in refused.stderr
    assert "003.png" in refused.stderr
    assert "007.png" in refused.stderr
    done = vitft("finetune", *flags, "--skip-broken", "--val-fraction=0")
    assert "2 broken pictures are left out" in done.stderr
    told = summary(tmp_path / "out")
    assert (told["n_train"], told["n_test"]) == (58, 11)


def test_a_split_without_a_readable_picture_is_named(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    picture = tmp_path / "red.png"
    paint(picture, (220, 30, 40))
    flags = ["--base", base, "--skip-broken"]
    train = ["finetune", *flags, *FLAGS, "--data", colours, "--out", tmp_path / "out"]
    neighbours = ["predict", *flags, picture, "--knn", colours]
    (colours / "train" / "red" / "003.png").write_bytes(b"\x89PNG no more")
    told = vitft(*neighbours)
    assert "1 broken picture is left out" in told.stderr
    assert "red 100.0%" in told.stdout
    shutil.copytree(colours / "test", colours / "val")
    for split, command, what in (
        ("val", train, "to validate with"),
        ("test", ["evaluate", *flags, "--data", colours], "in its test split"),
        ("train", train, "to train on"),
        ("train", neighbours, "to train on"),
    ):
        for image in (colours / split).rglob("*.png"):
            image.write_bytes(b"\x89PNG no more")
        assert f"has no readable image {what}" in vitft(*command, code=2).stderr


def test_a_class_without_test_images_is_trained_and_said(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    shutil.rmtree(colours / "test" / "green")
    flags = ["--base", base, "--data", colours, "--out", tmp_path / "out", *FLAGS]
    assert "no test image of green" in vitft("finetune", *flags).stderr
    assert summary(tmp_path / "out")["notes"] == ["no test image of green"]
    assert "<p>no test image of green</p>" in (tmp_path / "out" / "report.html").read_text()


def test_the_framing_of_a_run_is_that_of_its_predictions(
    colours: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    flags = ["--base", base, "--data", colours, "--out", tmp_path / "out", *FLAGS]
    vitft("finetune", *flags, "--resize=pad", "--crop=0.8")
    told = json.loads(vitft("inspect", tmp_path / "out", "--json").stdout)["preprocessing"]
    assert (told["resize"], told["crop"], told["image_size"]) == ("pad", 0.8, 8)


@pytest.mark.parametrize(("min_area", "side"), [(1.0, 40), (0.9, 42), (0.64, 50), (0.08, 50)])
def test_images_to_cut_parts_out_of_are_kept_larger(
    min_area: float, side: int, tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        for i, name in enumerate("ab"):
            paint(tmp_path / split / name / "0.png", (90 * i, ord(split[-1]), 0), (70, 60))
    options = PretrainOptions(data=str(tmp_path), out="x", min_area=min_area)
    splits = make_splits(load_data(str(tmp_path), Fit(40)), options, torch.device("cpu"))
    sizes = [images.held.shape[-1] for images in (splits.train, splits.validation, splits.test)]
    assert sizes == [side, 40, 40]
    assert kept_side(40, 1.0) == 40
