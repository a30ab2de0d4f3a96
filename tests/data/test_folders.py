from pathlib import Path

import pytest

from tests.shared import paint
from vitft.data.folders import list_folder
from vitft.data.sources import plausible_sources, source_of
from vitft.data.split import split
from vitft.pictures.preprocess import Fit


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("00012_00029", "00012"),
        ("img7_3", "img7"),
        ("IMG_20240131_093000", "IMG_20240131_093000"),
        ("20240131_093000123", "20240131_093000123"),
        ("ILSVRC2012_val_00000293", "ILSVRC2012_val_00000293"),
        ("cat", "cat"),
    ],
)
def test_a_track_is_known_by_its_name(name: str, source: str) -> None:
    assert source_of(Path("class") / f"{name}.jpg") == f"class/{source}"


def test_a_source_of_nearly_all_files_is_not_believed() -> None:
    tracks = [f"{track:03}_{frame}" for track in range(4) for frame in range(3)]
    wordnet = ["n01440764_" + str(i) for i in range(30)] + ["ILSVRC2012_val_1"]
    two = ["a1_1", "a1_2", "a2_1"]
    for names, makes_sense in ((tracks, True), (two, True), (wordnet, False)):
        paths = [Path(name) for name in names]
        sources = plausible_sources([source_of(path) for path in paths], paths)
        assert (len(set(sources)) < len(paths)) is makes_sense


def test_a_tenth_is_kept_for_validation_whatever_the_names(tmp_path: Path) -> None:
    for i in range(40):
        paint(tmp_path / "tench" / f"n01440764_{i}.png", (i, 0, 0))
        paint(tmp_path / "church" / f"ILSVRC2012_val_{i:08}.png", (i, 0, 0))
    images = list_folder(tmp_path).image_set("x", Fit(8), test_fraction=0.0).train
    train, validation = split(images, fraction=0.1, seed=0)
    assert (len(train), len(validation)) == (72, 8)
