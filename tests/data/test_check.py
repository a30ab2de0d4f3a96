"""What `vitft check` finds: counts, broken, doubled, one-coloured and uneven."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared import Run
from vitft.data.check import check
from vitft.data.folders import list_folder
from vitft.data.load import load_data
from vitft.pictures.preprocess import Fit


def picture(seed: int, size: int = 64) -> Image.Image:
    """Return a picture like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Return a set of 20 and 2 different pictures with one of every kind of fault."""
    for i in range(20):
        path = tmp_path / "train" / "many" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    for part, i in (("train", 100), ("test", 101)):
        path = tmp_path / part / "few" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    (tmp_path / "test" / "many").mkdir()
    shutil.copy(tmp_path / "train/many/3.png", tmp_path / "test/many/again.png")
    picture(5).resize((90, 90)).save(tmp_path / "test/many/near.jpg", quality=80)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "train/many/black.png")
    start = (tmp_path / "train/many/1.png").read_bytes()[:300]
    (tmp_path / "train/many/cut.png").write_bytes(start)
    (tmp_path / "train/many/notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.float32, "tiff")])
def test_deep_pictures_are_told_apart(kind: type, suffix: str, tmp_path: Path) -> None:
    def write(name: str, values: np.ndarray) -> None:
        Image.fromarray(values).save(tmp_path / "a" / name)

    (tmp_path / "a").mkdir()
    for i in range(4):
        grey = np.asarray(picture(i).convert("L"), dtype=np.float64)
        deep = grey * 100 + 20_000 if kind is np.uint16 else grey / 255
        write(f"{i}.{suffix}", deep.astype(kind))
    write("eight.png", grey.astype(np.uint8))
    write(f"plain.{suffix}", np.full((9, 9), 700, dtype=kind))
    found = check(list_folder(tmp_path))
    assert [path.name for path in found.one_colour] == [f"plain.{suffix}"]
    assert [{path.name for path in pair.paths} for pair in found.near] == [
        {f"3.{suffix}", "eight.png"}
    ]


def test_every_fault_is_found_in_one_run(odd: Path) -> None:
    found = check(list_folder(odd))
    assert found.counts == {
        ("many", "train"): 22,
        ("few", "train"): 1,
        ("few", "test"): 1,
        ("many", "test"): 2,
    }
    assert [path.name for path in found.broken] == ["cut.png"]
    assert [path.name for path in found.one_colour] == ["black.png"]
    (exact,), (near,) = found.exact, found.near
    assert {path.name for path in exact.paths} == {"3.png", "again.png"}
    assert {path.name for path in near.paths} == {"5.png", "near.jpg"}
    assert exact.in_two_splits
    assert near.in_two_splits
    assert exact.labels == ("many", "many")


def test_it_is_told_to_people_and_to_programs(odd: Path, vitft: Run) -> None:
    text = vitft("check", odd).stdout
    for told in (
        "few             1           1",
        "all            23           3",
        "uneven          few has 2 images, many 24",
        "sizes           64x64 in the middle, from 64x64 to 90x90",
        "passed over     1 .txt",
        "broken          1\n",
        "one colour      1\n",
        "twice           1, 1 of them in two splits, where they make accuracy look better\n",
        "nearly twice    1, 1 of them in two splits",
    ):
        assert told in text
    found = json.loads(vitft("check", odd, "--json").stdout)
    assert found["counts"] == {"few": {"test": 1, "train": 1}, "many": {"test": 2, "train": 22}}
    assert found["passed_over"] == {".txt": 1}
    assert [len(found[key]) for key in ("broken", "one_colour", "exact", "near")] == [1, 1, 1, 1]
    assert "neither a folder nor a CSV" in vitft("check", odd / "gone", code=2).stderr


def test_a_picture_of_several_labels_counts_for_each(odd: Path, vitft: Run) -> None:
    folder = odd / "train" / "many"
    (folder / "list.csv").write_text("path,label\n1.png,dog|beach\n2.png,dog\n3.png,beach | dog\n")
    found = json.loads(vitft("check", folder / "list.csv", "--json").stdout)
    assert found["counts"] == {"beach": {"all": 2}, "dog": {"all": 3}}
    lines = vitft("check", folder / "list.csv").stdout.splitlines()
    assert [line.split() for line in lines[1:4]] == [["beach", "2"], ["dog", "3"], ["all", "3"]]


def test_training_says_what_it_will_be_tested_on_twice(odd: Path) -> None:
    notes = load_data(str(odd), Fit(64)).notes
    (note,) = (note for note in notes if "to the bit" in note)
    assert note.startswith("1 validation or test images are also in train, to the bit")
