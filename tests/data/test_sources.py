import functools
import http.server
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.shared import paint
from vitft.data import named
from vitft.data.load import load_data
from vitft.data.named import DATASETS, import_torchvision
from vitft.data.sources import sources_of
from vitft.pictures.cache import data_folder
from vitft.pictures.preprocess import Fit


def test_a_folder_gives_its_classes_and_both_splits(folder: Path) -> None:
    data = load_data(str(folder), Fit(8))
    assert data.classes == ("blue", "green", "red")
    assert (len(data.train), len(data.test)) == (60, 12)
    assert data.train.decode(0)[:, 0, 0].tolist() == [20, 30, 200]
    assert data.train.labels.bincount().tolist() == [20, 20, 20]


def test_hidden_folders_and_folders_called_like_images_are_passed_over(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a/1.png", "b/1.jfif", "a/.ipynb_checkpoints/1-checkpoint.png"):
            paint(tmp_path / split / name, (0, 0, 0))
        (tmp_path / split / "a" / "photos.jpg").mkdir()
    assert len(load_data(str(tmp_path)).train) == 2


def test_tracks_are_read_from_file_names(tmp_path: Path) -> None:
    for name in ("00001_00002", "00001_00007", "00002_00002", "plain"):
        paint(tmp_path / "train" / "a" / f"{name}.png", (0, 0, 0))
        paint(tmp_path / "test" / "a" / f"{name}.png", (0, 0, 0))
    sources = load_data(str(tmp_path)).train.sources
    assert [source[-7:] for source in sources] == ["a/00001", "a/00001", "a/00002", "a/plain"]


def test_a_file_that_the_pattern_does_not_match_is_its_own_source() -> None:
    paths = [Path(name) for name in ("a/p1_x.png", "b/p1_y.png", "a/x.png", "b/x.png")]
    found = sources_of(paths, [0, 1, 0, 1], r"(p\d+)_")
    assert found == ["p1", "p1", str(paths[2]), str(paths[3])]


def test_drawn_sets_need_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "N_DRAWN", {"train": 12, "test": 5})
    shapes, symbols = load_data("shapes"), load_data("symbols", Fit(16, 1))
    assert not set(shapes.classes) & set(symbols.classes)
    assert shapes.train.decode(0).shape == (3, 32, 32)
    assert symbols.test.decode(0).shape == (1, 16, 16)


def test_every_named_set_is_one_of_torchvisions() -> None:
    datasets = import_torchvision().datasets
    assert all(hasattr(datasets, class_name) for class_name, *_ in DATASETS.values())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield where a small archive in CIFAR-10's form stands for the download."""
    datasets = import_torchvision().datasets
    home, rng = tmp_path / "server" / "cifar-10-batches-py", np.random.default_rng(0)
    home.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry: dict[str, Any] = {
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "labels": [0, 1, 9, 3],
        }
        (home / name).write_bytes(pickle.dumps(entry))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    packed = tmp_path / "server" / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(home, "cifar-10-batches-py")
    handler = functools.partial(Quiet, directory=str(packed.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{packed.name}"
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", None)
    for part in ("train_list", "test_list"):
        names = [[name, None] for name, _ in getattr(datasets.CIFAR10, part)]
        monkeypatch.setattr(datasets.CIFAR10, part, names)
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    monkeypatch.setenv("VITFT_DATA", str(tmp_path / "kept"))
    yield packed
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once(archive: Path) -> None:
    data = load_data("cifar10")
    assert (len(data.train), len(data.test), data.classes) == (20, 4, tuple("abcdefghij"))
    assert data.test.labels.tolist() == [0, 1, 9, 3]
    archive.unlink()
    again = load_data("CIFAR10")
    assert torch.equal(again.train.decode(7), data.train.decode(7))


def test_without_a_network_the_alternatives_are_named(archive: Path) -> None:
    archive.unlink()
    with pytest.raises(
        OSError, match=r"could not download to .*kept.*--data FOLDER .* --data shapes"
    ):
        load_data("cifar10")


def test_named_sets_are_kept_in_the_platforms_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITFT_DATA", raising=False)
    assert data_folder().name == "vitft"
    monkeypatch.setenv("VITFT_DATA", "elsewhere")
    assert data_folder() == Path("elsewhere")


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="unknown data set cifar11: neither a folder, .*, nor one of shapes, .*cifar10",
    ):
        load_data("cifar11")
    with pytest.raises(ValueError, match="holds no images; put them into .*/CLASS/"):
        load_data(str(tmp_path))
    paint(tmp_path / "train" / "cat" / "1.png", (0, 0, 0))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="dog holds no images; remove the folder"):
        load_data(str(tmp_path))
    paint(tmp_path / "train" / "dog" / "1.png", (0, 0, 0))
    paint(tmp_path / "test" / "cat" / "1.png", (0, 0, 0))
    paint(tmp_path / "test" / "cow" / "1.png", (0, 0, 0))
    with pytest.raises(ValueError, match="class cow stands only in test"):
        load_data(str(tmp_path))
