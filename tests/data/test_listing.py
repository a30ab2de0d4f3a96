"""Folders and tables as people have them: splits, what is passed over, what is held out."""

import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.shared import paint
from vitft.data.folders import find_images, is_new_class, list_folder
from vitft.data.listing import ImageSet
from vitft.data.load import load_data, unambiguous
from vitft.pictures.preprocess import Fit


def fill(root: Path, names: str, n: int = 5) -> None:
    """Paint `n` images into each of the folders."""
    for k, name in enumerate(names.split()):
        for i in range(n):
            paint(root / name / f"p{i}x.png", (10 * k, i, 0))


def sizes(data: ImageSet) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_a_validation_split_is_taken_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    fill(tmp_path, f"train/a train/b {name}/a {name}/b test/a test/b extra")
    data = load_data(str(tmp_path), Fit(8))
    assert sizes(data) == (10, 10, 10)
    assert data.notes == ("skipped, since they are no split: extra",)


def test_without_a_test_split_nothing_is_held_out_unless_asked_for(tmp_path: Path) -> None:
    fill(tmp_path, "train/a train/b val/a")
    assert sizes(load_data(str(tmp_path), Fit(8))) == (10, 5, 0)
    assert sizes(load_data(str(tmp_path), Fit(8), test_fraction=0.4)) == (6, 5, 4)
    assert sizes(load_data(str(tmp_path / "val"), Fit(8), test_fraction=0.4)) == (3, 0, 2)
    shutil.rmtree(tmp_path / "train")
    assert sizes(load_data(str(tmp_path), Fit(8), test_fraction=0.4)) == (0, 5, 0)
    fill(tmp_path, "test/a")
    with pytest.raises(ValueError, match="has a test split, so --test-fraction has nothing to do"):
        load_data(str(tmp_path), Fit(8), test_fraction=0.4)


def test_classes_alone_are_split_the_same_way_every_time(tmp_path: Path) -> None:
    fill(tmp_path, "a b test", n=10)  # with classes beside it, "test" is a class
    data, again = (load_data(str(tmp_path), Fit(8)) for _ in range(2))
    assert data.classes == ("a", "b", "test")
    assert sizes(data) == (24, 0, 6)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    assert data.test.sources == again.test.sources
    assert not {*data.test.sources} & {*data.train.sources}
    assert data.notes == (
        "these images have no splits: 6 of 30 are held out as the test split, "
        "the same in every run",
    )
    assert sizes(load_data(str(tmp_path), Fit(8), test_fraction=1.0)) == (0, 0, 30)
    with pytest.raises(ValueError, match="test_fraction=1.5 is not in 0 <= test_fraction <= 1"):
        load_data(str(tmp_path), Fit(8), test_fraction=1.5)


def test_a_source_stands_in_one_split(tmp_path: Path) -> None:
    for patient in range(6):
        for i in range(4):
            paint(tmp_path / "ill" / f"patient{patient}-{i}.png", (patient, i, 0))
            paint(tmp_path / "well" / f"patient{patient + 9}-{i}.png", (patient, i, 0))
    data = load_data(str(tmp_path), Fit(8), source_pattern=r"(patient\d+)-")
    assert {*data.test.sources, *data.train.sources} == {
        f"patient{i}" for i in (*range(6), *range(9, 15))
    }
    assert not {*data.test.sources} & {*data.train.sources}
    for pattern, told in (("(", "is no regular expression"), ("p", "has no group")):
        with pytest.raises(ValueError, match=told):
            load_data(str(tmp_path), Fit(8), source_pattern=pattern)


def test_a_class_without_test_images_is_said(tmp_path: Path) -> None:
    fill(tmp_path, "train/a train/b test/b")
    (tmp_path / "test" / "a").mkdir()
    data = load_data(str(tmp_path), Fit(8))
    assert data.notes == ("no test image of a",)
    assert data.test.labels.tolist() == [1] * 5


@pytest.mark.parametrize(("n", "more"), [(10, ""), (12, " and 2 more")])
def test_ten_classes_without_a_test_image_are_named(n: int, more: str, tmp_path: Path) -> None:
    names = [f"c{i:02}" for i in range(n)]
    fill(tmp_path, " ".join(f"train/{name}" for name in [*names, "x"]) + " test/x", n=1)
    (note,) = load_data(str(tmp_path), Fit(8)).notes
    assert note == f"no test image of {', '.join(names[:10])}{more}"


def test_images_are_known_by_content_where_their_names_tell_nothing(tmp_path: Path) -> None:
    for name, kind in (
        ("a", "JPEG"),
        ("b.jpe", "JPEG"),
        ("c.jpg?w=200", "JPEG"),
        ("d.AVIF", "AVIF"),
        ("e.dat", "PNG"),
    ):
        Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / name, kind)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "none").write_bytes(b"")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["a", "b.jpe", "c.jpg?w=200", "d.AVIF", "e.dat"]


def test_a_phones_picture_is_known_by_its_content(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "x.heic")
    for name in ("a", "b.heic?w=200"):
        shutil.copy(tmp_path / "x.heic", tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == ["a", "b.heic?w=200", "x.heic"]


def test_what_is_passed_over_is_counted_by_its_kind(tmp_path: Path) -> None:
    fill(tmp_path, "train/a train/b test/a test/b")
    for name in ("train/a/1.txt", "train/b/2.TXT", "test/a/README", "train/a/.hidden.txt"):
        (tmp_path / name).write_text("no image")
    for name in ("train/1.png", "2.png"):
        paint(tmp_path / name, (0, 0, 0))
    (tmp_path / "labels.csv").write_text("no image")
    (note,) = load_data(str(tmp_path), Fit(8)).notes
    assert note == (
        "6 files are passed over: 2 in no class's folder, 2 .txt, 1 .csv, 1 without a suffix"
    )


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere train/a")
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "a" / "more")
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "a" / "again")
    os.symlink(tmp_path / "train", tmp_path / "train" / "a" / "loop")
    os.symlink(tmp_path / "gone", tmp_path / "train" / "a" / "broken.png")
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path / "train" / "a")]
    again = [name for name in found if "/again/" in name]
    assert len(again) == 5
    assert len(found) == 10


def test_a_link_to_a_folder_above_is_followed_nowhere(tmp_path: Path) -> None:
    """Else one class's images would be another's, too."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    fill(tmp_path, "data/a data/b elsewhere")
    for link, target in (("data/self", data), ("data/a/up", data), ("data/b/out", elsewhere)):
        os.symlink(target, tmp_path / link)
    os.symlink(data, elsewhere / "back")
    os.symlink(tmp_path / "gone", data / "a" / "broken.png")
    found = list_folder(data)
    assert Counter(found.labels) == {"a": 5, "b": 10}
    assert found.skipped == {"link to a folder that is read already": 3, "link to nothing": 1}


def test_a_folder_named_by_dots_is_searched(tmp_path: Path) -> None:
    fill(tmp_path, "pictures/more")
    (tmp_path / "pictures" / "more" / "empty").mkdir()
    for name in ("more", "more/empty/..", "more/.."):
        assert len(find_images(tmp_path / "pictures" / name)) == 5


def test_a_new_folder_among_the_classes_is_known(tmp_path: Path) -> None:
    fill(tmp_path, "classes/a classes/b splits/train/a splits/test/a tests/test/a")
    (tmp_path / "table.csv").touch()
    new = ["classes/run", "classes/runs/1", "splits/train/run", "splits/test/run", "tests/run"]
    other = ["classes", "classes/a", "classes/a/run", "splits/run", "splits/train/a/run", "run"]
    for name in (*new, *other):
        data = tmp_path / name.split("/")[0]
        assert is_new_class(tmp_path / name, data) is (name in new)
    assert not is_new_class(tmp_path / "run", tmp_path / "table.csv")


TABLE = "path,label,split\n{rows}"


def test_a_table_names_files_beside_it(tmp_path: Path) -> None:
    fill(tmp_path, "pictures", n=6)
    rows = [
        f"pictures/p{i}x.png,{'cat' if i % 2 else 'dog'},{part}"
        for i, part in enumerate(("train", "train", "Val", "valid", "test", "test"))
    ]
    (tmp_path / "list.csv").write_text("\ufeff" + TABLE.format(rows="\n".join(rows)))
    data = load_data(str(tmp_path / "list.csv"), Fit(8))
    assert (data.name, data.classes, sizes(data)) == ("list", ("cat", "dog"), (2, 2, 2))
    assert data.test.labels.tolist() == [1, 0]
    assert data.test.decode(0)[1, 0, 0] == 4
    tabs = TABLE.format(rows="\n".join(rows)).replace(",", "\t").replace("path", "file_name")
    (tmp_path / "list.tsv").write_text(tabs)
    assert sizes(load_data(str(tmp_path / "list.tsv"), Fit(8))) == (2, 2, 2)


def test_parquet_is_read_as_other_tables(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fill(tmp_path, "pictures", n=10)
    paths, labels = zip(*((f"pictures/p{i}x.png", i % 2) for i in range(10)), strict=True)
    table = pa.table({"path": paths, "label": labels})
    pq.write_table(table, tmp_path / "list.parquet")
    data = load_data(str(tmp_path / "list.parquet"), Fit(8))
    assert (data.classes, sizes(data)) == (("0", "1"), (8, 0, 2))


def test_what_parquet_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"^Parquet needs pyarrow; install vitft\[parquet\]$"):
        load_data(str(tmp_path / "list.parquet"), Fit(8))


@pytest.mark.parametrize("n", [2, 10, 11])
def test_missing_files_are_counted_and_ten_are_named(n: int, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(n)]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{x},a\n" for x in names))
    named = ", ".join(str(tmp_path / name) for name in names[:10]) + ", ..." * (n > 10)
    with pytest.raises(ValueError, match=f": {n} of its files are missing: {re.escape(named)}$"):
        load_data(str(tmp_path / "list.csv"), Fit(8))


@pytest.mark.parametrize("name", ["list.parquet", "list.csv"])
def test_a_broken_table_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{name} is no readable table \("):
        load_data(str(tmp_path / name), Fit(8))


def test_an_imagefolder_of_hugging_face_is_read(tmp_path: Path) -> None:
    for part, n in (("train", 4), ("test", 2)):
        fill(tmp_path, f"{part}/deep", n=n)
        rows = "".join(f"deep/p{i}x.png,{'ab'[i % 2]}\n" for i in range(n))
        (tmp_path / part / "metadata.csv").write_text("file_name,label\n" + rows)
    data = load_data(str(tmp_path), Fit(8))
    assert (data.classes, sizes(data)) == (("a", "b"), (4, 0, 2))


@pytest.mark.parametrize("part", ["", "train"])
def test_a_metadata_csv_of_other_facts_leaves_the_folders(part: str, tmp_path: Path) -> None:
    fill(tmp_path / part, "a b")
    table = tmp_path / part / "metadata.csv"
    table.write_text("patient,age\n1,40\n")
    found = list_folder(tmp_path)
    assert Counter(found.labels) == {"a": 5, "b": 5}
    assert found.skipped == {"metadata.csv without image names and labels": 1}
    for name in "ab":
        shutil.rmtree(tmp_path / part / name)
    with pytest.raises(ValueError, match=r"has no column path; it has patient, age"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no rows"),
        ("name,label\n1.png,a\n", "has no column path; it has name, label"),
        ("path,class\n1.png,a\n", "has no column label; it has path, class"),
        ("path,label\n1.png,\n", "row 1 lacks its label"),
        ("path,label\n1.png,a\n,b\n", "row 2 lacks its path"),
        ("path,label,split\n1.png,a,dev\n", "row 1 is of split 'dev', not train, validation, test"),
        ("path,label\n1.png,a\nx.png,b\n", r"1 of its files are missing: .*x\.png"),
    ],
)
def test_a_table_that_lacks_something_says_what(text: str, told: str, tmp_path: Path) -> None:
    paint(tmp_path / "1.png", (0, 0, 0))
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_data(str(tmp_path / "list.csv"), Fit(8))


def test_broken_pictures_are_listed_or_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "train/a train/b", n=8)
    names = sorted((tmp_path / "train").rglob("*.png"))
    for path in (names[0], names[5], names[9]):
        path.write_bytes(path.read_bytes()[:40])
    images = load_data(str(tmp_path), Fit(8)).train
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="^3 of 16 images are broken; .*--skip-broken.*p0x.png"):
        images.to(device)
    for max_bytes in (2**30, 0):  # held, and streamed
        found, broken = load_data(str(tmp_path), Fit(8)).train.readable(device, max_bytes)
        assert (len(found), len(broken)) == (13, 3)
        assert (found.held is not None) == bool(max_bytes)
        assert found.labels.bincount().tolist() == [6, 7]
        batches = found.batches(torch.arange(13).split(13), device)
        pixels = torch.cat([batch for batch, _ in batches])
        assert pixels[:, 1, 0, 0].tolist() == [1, 2, 3, 4, 6, 7, 0, 2, 3, 4, 5, 6, 7]


def test_a_folder_called_as_a_named_set_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        paint(tmp_path / f"shapes/train/{name}/0.png", (1, 2, 3))
    monkeypatch.chdir(tmp_path)
    found = load_data("shapes")
    assert found.classes == ("a", "b")
    assert "shapes is taken as the folder here, not the set of that name" in found.notes
    assert (unambiguous("shapes"), unambiguous("symbols")) == ("./shapes", "symbols")
