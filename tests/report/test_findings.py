"""What a report shows is kept as a file; its pictures come from the original files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.report.test_report import findings, predictions
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit
from vitft.report.findings import Findings
from vitft.report.thumbnails import Thumbnails, brightened


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    for given in (predictions([0, 1, 2], [1, 2, 2]), {**predictions([0], [0]), "labels": None}):
        if given["labels"] is None:
            given["labels"] = torch.tensor([[1, 0, 1]])
        found = findings(**given)
        found.write(tmp_path)
        assert Findings.read(tmp_path) == found
        path = tmp_path / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added": "by a newer vitft"}))
        assert Findings.read(tmp_path) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusions": [[0, 3, 1]]}, "a class that it does not name"),
        ({"precisions": [[0.5, 1]]}, "a class that it does not name"),
        ({"split": "<i>"}, "split"),
        ({"bins": [[0, 0.5, 0.5]]}, "bins"),
        ({"mistakes": [{"name": "a", "says": "b", "picture": 1}]}, "picture"),
        ({"classes": ["cat", "dog", "\ud800"]}, r"the name '\\ud800' is no text"),
        ({"changes": [{"layer": "\udcff", "size": 1.0, "rank": None}]}, "is no text"),
    ],
)
def test_what_is_kept_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    findings(**predictions([0, 1, 2], [1, 2, 2])).write(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Findings.read(tmp_path)


def test_of_many_images_only_a_few_are_read() -> None:
    read: list[int] = []
    given = predictions([*range(3)] * 400, [*range(3)] * 200 + [0] * 600)
    decode = given["image"]
    given["image"] = lambda i: read.append(i) or decode(i)
    found = findings(**given, look=lambda image: torch.ones(2, 2))
    assert len(read) <= 24 + 2 * 8
    assert [shown.says for shown in found.looks][:3] == ["cat 90%", "dog 90%", "owl 90%"]
    assert all("→" in shown.says for shown in found.looks[3:])


def photograph(path: Path, *, turned: bool = False) -> None:
    """Write a JPEG of 400 x 300 pixels, the left half white, the right half black."""
    image = Image.new("RGB", (400, 300))
    image.paste("white", (0, 0, 200, 300))
    exif = Image.Exif()
    if turned:
        exif[274] = 6  # to be turned by 90 degrees clockwise
    image.save(path, exif=exif)


def opened(data: bytes) -> Image.Image:
    """Return the picture in a file's bytes."""
    return Image.open(io.BytesIO(data))


def test_a_picture_comes_from_its_file_with_its_name(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "gone.jpg")]
    photograph(tmp_path / "a.jpg")
    photograph(tmp_path / "b.jpg", turned=True)
    tensor = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    images = Images(lambda i: tensor, torch.zeros(3), names=names, are_files=True)
    thumbnails = Thumbnails(images.subset(torch.tensor([0, 1, 2])), Fit(8))
    assert [thumbnails.name(i) for i in range(3)] == ["a.jpg", "b.jpg", "gone.jpg"]
    sizes = [opened(thumbnails.picture(i)).size for i in range(3)]
    assert sizes == [(256, 192), (192, 256), (8, 8)]
    picture, lit = (opened(x) for x in thumbnails.look(0, torch.tensor([[0.0, 1.0], [0.0, 1.0]])))
    assert picture.size == lit.size == (256, 256)
    numbers = Thumbnails(Images(lambda i: tensor, torch.zeros(3), names=names), Fit(8))
    assert numbers.name(0) == ""
    assert opened(numbers.picture(0)).size == (8, 8)


def test_the_light_falls_where_the_weights_are() -> None:
    white = Image.new("RGB", (64, 64), "white")
    seen = np.array(brightened(white, torch.tensor([[0.1, 0.1], [0.1, 0.7]])))[..., 0]
    assert seen[-1, -1] > 240
    assert max(seen[0, 0], seen[0, -1], seen[-1, 0]) < 0.2 * 255
    assert seen[32, 0] < seen[32, 32] < seen[-1, -1]
