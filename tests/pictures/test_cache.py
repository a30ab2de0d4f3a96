"""Decoded images are kept between runs, and whatever happens to the file, the images are right."""

import os
from pathlib import Path

import pytest
import torch

from tests.shared import paint
from vitft.data.listing import FileImages
from vitft.data.load import load_data
from vitft.pictures import cache
from vitft.pictures.cache import CachedDecoder, cached, decoded_folder
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit

CPU = torch.device("cpu")
fit = Fit(8)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFT_DATA", str(tmp_path / "cache"))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return the files of five pictures, each of a colour of its own."""
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        paint(path, (i, 50 * i, 255 - i), (12, 9))
    return paths


def counting(paths: list[Path], fit: Fit = fit) -> tuple[CachedDecoder, list[int]]:
    """Return a decoder that keeps, and the numbers of the images that it had to decode."""
    decoded: list[int] = []
    files = FileImages(paths, fit)

    def decode(i: int) -> torch.Tensor:
        decoded.append(i)
        return files(i)

    found = cached(decode, paths, fit)
    assert isinstance(found, CachedDecoder)
    return found, decoded


def test_an_image_is_decoded_once_and_is_the_same(paths: list[Path]) -> None:
    first, decoded = counting(paths)
    images = [first(i) for i in (3, 1, 3)]
    again, decoded_again = counting(paths)
    assert [torch.equal(again(i), x) for i, x in zip((3, 1), images[:2], strict=True)] == [True] * 2
    assert torch.equal(again(0), FileImages(paths, fit)(0))
    assert (decoded, decoded_again) == ([3, 1], [0])


@pytest.mark.parametrize("change", ["content", "time", "fit", "names"])
def test_what_has_changed_is_decoded_anew(change: str, paths: list[Path]) -> None:
    first, _ = counting(paths)
    first(2)
    other = fit
    if change == "content":
        paint(paths[2], (9, 9, 9), (30, 30))
    elif change == "time":
        os.utime(paths[2], (1, 1))
    elif change == "fit":
        other = Fit(8, fill=(9,))
    else:
        paths[4].rename(paths[4].with_name("renamed.png"))
        paths[4] = paths[4].with_name("renamed.png")
    again, decoded = counting(paths, other)
    assert torch.equal(again(2), FileImages(paths, other)(2))
    assert decoded == [2]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "a folder"])
def test_a_damaged_file_costs_time_and_nothing_else(damage: str, paths: list[Path]) -> None:
    first, _ = counting(paths)
    expected = [first(i) for i in range(5)]
    if damage == "flipped":
        content = bytearray(first.path.read_bytes())
        content[first.n_bytes + 50] ^= 1
        first.path.write_bytes(content)
    elif damage == "cut":
        os.truncate(first.path, first.n_bytes + 50)
    else:
        first.path.unlink()
        if damage == "a folder":
            first.path.mkdir()
    for i, image in enumerate(expected):
        assert torch.equal(first(i), image)
    if damage == "flipped":
        again, decoded = counting(paths)
        assert torch.equal(again(1), expected[1])
        assert not decoded  # it was kept again


def test_without_a_folder_to_write_to_nothing_is_kept(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITFT_DATA", str(tmp_path / "file"))
    files = FileImages(paths, fit)
    assert cached(files, paths, fit) is files


def test_files_take_no_more_than_the_limit(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_KEPT", 310_000)
    found = []
    for size in (128, 129, 130):  # 49 to 51 kB an image
        kept_images, _ = counting(paths, Fit(size))
        kept_images(0)
        os.utime(kept_images.path, (size, size))
        found.append(kept_images.path)
    assert [path.is_file() for path in found] == [False, True, True]
    files = FileImages(paths, Fit(256))
    assert cached(files, paths, Fit(256)) is files  # larger than the limit
    assert found[-1].is_file()


def test_a_set_is_kept_whole_and_streamed_alike(folder: Path) -> None:
    held = load_data(str(folder), fit).train.to(CPU).held
    assert held is not None
    streamed = load_data(str(folder), fit).train.to(CPU, max_bytes=0)
    assert streamed.held is None
    (path,) = decoded_folder().glob("*.images")
    before = path.read_bytes()
    batches = streamed.batches(torch.arange(60).split(7), CPU)
    assert torch.equal(torch.cat([images for images, _ in batches]), held)
    assert path.read_bytes() == before


def test_training_images_may_be_larger(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(3):
            paint(tmp_path / "set" / "train" / name / f"{i}.png", (9 * i, 0, 0), (30, 12))
    train = load_data(str(tmp_path / "set"), fit).train
    assert train.subset(torch.tensor([0, 5])).at(10).decode(1).shape == (3, 10, 10)
    assert train.at(50).decode(0).shape == (3, 12, 12)  # as large as the pictures are
    assert train.at(4).decode(0).shape == (3, 8, 8)  # not smaller than what the model takes
    assert train.at(10).at(9).decode(0).shape == (3, 9, 9)
    fixed = Images(lambda _: torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2).long())
    assert fixed.at(9) is fixed
