"""Folders and drawn sets: classes, order, sources and every refusal in words."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shared import paint
from vitft.data import named
from vitft.data.folders import find_images, list_folder
from vitft.data.listing import ImageSet
from vitft.data.load import load_data
from vitft.data.named import DATASETS
from vitft.data.shapes import CLASSES, draw
from vitft.data.sources import plausible_sources, source_of
from vitft.pictures.cache import data_folder
from vitft.pictures.preprocess import Fit


def whole(folder: Path) -> ImageSet:
    """Return a folder with CLASS/* as a set that holds nothing out."""
    return list_folder(folder).image_set("x", Fit(8), test_fraction=0.0)


def test_classes_and_images_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for value, name in enumerate(("b/2.png", "b/1.PNG", "a/z/1.jpeg", "a/b.bmp", ".c/1.png")):
        paint(tmp_path / name, (10 * value, 0, 0))
    (tmp_path / "notes.txt").write_text("no folder")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = whole(tmp_path)
    images = data.train
    assert data.classes == ("a", "b")
    assert data.notes == ("2 files are passed over: 2 .txt",)
    assert images.labels.tolist() == [0, 0, 1, 1]
    found = [int(images.decode(i)[0, 0, 0]) for i in range(4)]
    assert [round(value, -1) for value in found] == [30, 20, 10, 0]  # JPEG is near it
    assert [Path(source).name for source in images.sources] == ["b", "1", "1", "2"]


def test_sources_are_believed_class_by_class(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / "one" / f"n01_{i}.png", (0, 0, 0))
        paint(tmp_path / "two" / f"n0{i % 2}_{i}.png", (0, 0, 0))
    images = whole(tmp_path).train
    one, two = images.sources[:4], images.sources[4:]
    assert one == [str(tmp_path / "one" / f"n01_{i}.png") for i in range(4)]
    assert two == [f"{tmp_path}/two/n0{i}" for i in (0, 0, 1, 1)]


@pytest.mark.parametrize(("n_same", "makes_sense"), [(3, True), (4, False)])
def test_a_source_of_more_than_three_quarters_makes_no_sense(
    n_same: int, makes_sense: bool
) -> None:
    names = ["same"] * n_same + [f"other{i}" for i in range(4 - n_same)]
    paths = [Path(f"{i}.png") for i in range(4)]
    assert plausible_sources(names, paths) == (
        names if makes_sense else [f"{i}.png" for i in range(4)]
    )
    assert plausible_sources([], []) == []


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("20240131_093000", "20240131_093000"),  # a date and a time
        ("IMG_20240131_093000", "IMG_20240131_093000"),
        ("IMG20240131_0930001", "IMG20240131_0930001"),
        ("x20240131_093000123", "x20240131_093000123"),
        ("20240131_09300", "20240131"),  # five digits are no time
        ("20240131_0930001234", "20240131"),
        ("120240131_093000", "120240131"),  # nine are no date
        ("2024013_093000", "2024013"),
        ("1_2_3", "1_2"),
        ("a_2", "a_2"),
        ("7_b", "7_b"),
    ],
)
def test_a_track_is_what_stands_before_a_frames_number(stem: str, source: str) -> None:
    assert source_of(Path("d") / f"{stem}.png") == f"d/{source}"


def test_images_are_files_of_known_suffixes_none_hidden(tmp_path: Path) -> None:
    suffixes = ["bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"]
    for name in [*(f"{i}.{suffix}" for i, suffix in enumerate(suffixes)), "x.JPG", "y.txt"]:
        (tmp_path / name).touch()
    for name in (".hidden.png", ".git/1.png", "deep/.x/1.png", "deep/er/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    expected = [*(f"{i}.{suffix}" for i, suffix in enumerate(suffixes)), "x.JPG", "deep/er/1.png"]
    assert found == sorted(expected)


def test_hidden_parts_above_the_folder_do_not_matter(tmp_path: Path) -> None:
    paint(tmp_path / ".cache" / "a" / "1.png", (0, 0, 0))
    assert len(find_images(tmp_path / ".cache" / "a")) == 1


def refused(told: str, data: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        load_data(data, **options)


def test_what_is_no_data_set_is_refused_in_whole_sentences(tmp_path: Path) -> None:
    known = ", ".join(["shapes", "symbols", *DATASETS])
    kinds = "a folder, a CSV, TSV or Parquet file"
    refused(f"unknown data set x: neither {kinds}, nor one of {known}", "x")
    for n in (0, 2, 4):
        told = f"n_channels={n} is neither 1 (grey) nor 3 (colour), as image files have"
        with pytest.raises(ValueError, match=re.escape(told)):
            Fit(8, n)
    data, train = str(tmp_path), tmp_path / "train"
    told = f"{data} holds no images; put them into {data}/CLASS/, a folder for each class"
    refused(told, data)
    train.mkdir()
    told = f"{train} holds no images; put them into {train}/CLASS/, a folder for each class"
    refused(told, data)
    paint(train / "cat" / "1.png", (0, 0, 0))
    (train / "dog").mkdir()
    told = f"{train}/dog holds no images; remove the folder or put images into it"
    refused(told, data)
    (train / "dog").rmdir()
    paint(tmp_path / "test" / "cat" / "1.png", (0, 0, 0))
    for part in ("test", "val"):
        paint(tmp_path / part / "cow" / "1.png", (0, 0, 0))
        where = {"val": "validation"}.get(part, part)
        told = f"{tmp_path.name}: class cow stands only in {where}; "
        refused(told + "put images of it into train, or remove it", data)
        shutil.rmtree(tmp_path / part)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "Valid").mkdir()
    refused(f"{data} holds Valid and val, which are one split; join them", data)


def test_a_folder_gives_images_of_the_size_and_channels_asked_for(folder: Path) -> None:
    data = load_data(str(folder), Fit(4, 1))
    assert data.name == folder.name
    assert data.train.decode(0).shape == data.test.decode(0).shape == (1, 4, 4)
    assert load_data(str(folder)).train.decode(0).shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (60, 12)


def test_a_test_split_alone_is_enough_where_only_it_is_asked_for(tmp_path: Path) -> None:
    paint(tmp_path / "test" / "cat" / "1.png", (7, 0, 0))
    paint(tmp_path / "test" / "dog" / "1.png", (9, 0, 0))
    data = load_data(str(tmp_path), Fit(8))
    assert (data.name, data.classes) == (tmp_path.name, ("cat", "dog"))
    assert (len(data.train), len(data.test)) == (0, 2)
    assert data.test.decode(1)[0, 0, 0] == 9


@pytest.mark.parametrize("name", ["shapes", "symbols"])
def test_a_drawn_set_is_what_is_drawn_for_two_seeds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "N_DRAWN", {"train": 12, "test": 5})
    data = load_data(name)
    assert (data.name, data.classes) == (name, CLASSES[name])
    for images, seed, n in ((data.train, 0, 12), (data.test, 1, 5)):
        pixels, labels = draw(name, n, seed=seed)
        assert torch.equal(images.labels, labels)
        assert torch.equal(torch.stack([images.decode(i) for i in range(n)]), pixels)


def test_the_folder_of_named_sets_is_the_users_or_the_platforms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("/cache") / name)
    monkeypatch.setenv("VITFT_DATA", "/mine")
    assert data_folder() == Path("/mine")
    monkeypatch.setenv("VITFT_DATA", "")
    assert data_folder() == Path("/cache/vitft")
    monkeypatch.delenv("VITFT_DATA")
    assert data_folder() == Path("/cache/vitft")
