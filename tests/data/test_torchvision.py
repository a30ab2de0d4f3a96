"""Named sets: what is taken of torchvision's, wherever each of them keeps it."""

from collections.abc import Callable
from pathlib import Path
from tarfile import TarError
from types import SimpleNamespace
from typing import Any
from zipfile import BadZipFile

import pytest
import torch
from PIL import Image

from vitft.data import named
from vitft.data.load import load_data
from vitft.data.named import import_torchvision
from vitft.pictures.preprocess import Fit


class Pairs:
    """A set of images and labels, as torchvision's are, with other attributes beside."""

    def __init__(self, numbers: list[int], **attributes: Any) -> None:
        self.pairs = [(Image.new("RGB", (8, 8), (label, 0, 0)), label) for label in numbers]
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.pairs[i]


LABELS = [2, 0, 1]
WIDE = torch.tensor([[2, 9], [0, 9], [1, 9]])


@pytest.mark.parametrize(
    "dataset",
    [
        Pairs([7, 7, 7], targets=LABELS),
        Pairs([7, 7, 7], targets=torch.tensor(LABELS)),
        Pairs([7, 7, 7], targets=WIDE),
        Pairs([7, 7, 7], labels=torch.tensor(LABELS).numpy()),
        Pairs([7, 7, 7], _labels=LABELS),
        Pairs([7, 7, 7], _samples=[("a.png", label) for label in LABELS]),
        Pairs(LABELS),
        Pairs(LABELS, _samples=[]),
    ],
)
def test_labels_are_found_where_a_set_keeps_them(dataset: Pairs) -> None:
    found = named._labels(dataset)
    assert found == LABELS
    assert all(type(label) is int for label in found)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return what the sets are made of: (class, split) -> set, and the calls that were made."""
    made: dict[str, Any] = {"calls": []}

    def maker(name: str) -> Callable[..., Pairs]:
        def make(root: Path, **arguments: Any) -> Pairs:
            made["calls"].append((name, root, arguments))
            return made[arguments["split"]]

        return make

    fake = SimpleNamespace(datasets=SimpleNamespace(GTSRB=maker("GTSRB"), Food101=maker("Food101")))
    monkeypatch.setattr(named, "import_torchvision", lambda: fake)
    monkeypatch.setenv("VITFT_DATA", str(tmp_path))
    return made


def test_a_named_set_has_its_splits_and_the_tracks_of_its_files(
    sets: dict[str, Any], tmp_path: Path
) -> None:
    samples = [("x/00001_00001.ppm", 2), ("x/00001_00002.ppm", 0), (Path("x/00003_00001.ppm"), 1)]
    sets["train"], sets["test"] = Pairs(LABELS, _samples=samples), Pairs([1, 0])
    data = load_data("GTSRB", Fit(4, 3))
    root = tmp_path / "gtsrb"
    assert sets["calls"] == [
        ("GTSRB", root, {"split": "train"}),
        ("GTSRB", root, {"split": "test"}),
    ]
    assert (data.name, data.classes) == ("gtsrb", ("0", "1", "2"))
    assert data.train.labels.tolist() == LABELS
    assert data.test.labels.tolist() == [1, 0]
    assert data.train.sources == ["x/00001", "x/00001", "x/00003"]
    assert data.test.sources == ["0", "1"]
    assert data.train.decode(0)[:, 0, 0].tolist() == [2, 0, 0]
    assert data.test.decode(0).shape == (3, 4, 4)


def test_classes_have_the_names_that_the_set_gives_them(sets: dict[str, Any]) -> None:
    for names, expected in (
        (["cat", "dog", "owl"], ("cat", "dog", "owl")),
        ([("tench", "fish"), ("church",), ("radio", "x")], ("tench", "church", "radio")),
        ([7, 8, 9], ("7", "8", "9")),
        (None, ("0", "1", "2")),
    ):
        sets["train"], sets["test"] = Pairs(LABELS, classes=names), Pairs(LABELS)
        assert load_data("food101").classes == expected


def test_samples_that_are_no_paths_are_no_sources(sets: dict[str, Any]) -> None:
    sets["train"] = Pairs(LABELS, _samples=[(i, label) for i, label in enumerate(LABELS)])
    sets["test"] = Pairs(LABELS)
    assert load_data("food101").train.sources == ["0", "1", "2"]


def test_a_set_is_downloaded_only_where_it_is_not_there(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def there(root: Path, **arguments: Any) -> str:
        calls.append({"root": root} | arguments)
        return "the set"

    def missing(root: Path, download: bool = False, **arguments: Any) -> str:
        if not download:
            raise RuntimeError("Dataset not found")
        return there(root, download=download, **arguments)

    assert named._open(there, tmp_path, {"split": "a"}) == "the set"
    assert named._open(missing, tmp_path, {"split": "a"}) == "the set"
    assert calls == [
        {"root": tmp_path, "split": "a"},
        {"root": tmp_path, "split": "a", "download": True},
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first line\nsecond"), "first line"),
        (OSError("no route"), "no route"),
        (EOFError(), "EOFError"),
        (BadZipFile("bad zip"), "bad zip"),
        (TarError("bad tar"), "bad tar"),
    ],
)
def test_a_failed_download_says_why_and_what_to_do(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    def fail(root: Path, download: bool = False) -> None:
        raise error if download else RuntimeError("not there")

    message = (
        rf"^could not download to {tmp_path} \({reason}\); put the files there on a machine with "
        "a network, or use --data FOLDER with train/CLASS and test/CLASS, or --data shapes, "
        "which needs none$"
    )
    with pytest.raises(OSError, match=message):
        named._open(fail, tmp_path, {})


def test_a_set_that_needs_another_package_says_which(tmp_path: Path) -> None:
    def fail(root: Path, download: bool = False) -> None:
        raise ImportError("No module named 'h5py'") if download else RuntimeError("not there")

    with pytest.raises(ValueError, match="^the set needs another package: No module named 'h5py'$"):
        named._open(fail, tmp_path, {})


class Importing:
    """Stands for importing: fails with each of the errors in turn, then gives the module."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.names = [*errors], list[str]()

    def import_module(self, name: str) -> str:
        self.names.append(name)
        if self.errors:
            raise self.errors.pop(0)
        return "the module"


def test_torchvision_for_another_torch_is_imported_with_the_operators_it_looks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importing = Importing(RuntimeError("operator torchvision::nms does not exist"))
    defined: list[str] = []
    modules = dict.fromkeys(["torch", "torchvision", "torchvision.ops.boxes", "torchvisions"])
    monkeypatch.setattr(named, "importlib", importing)
    monkeypatch.setattr(named, "sys", SimpleNamespace(modules=modules))
    monkeypatch.setattr(named, "_OPERATORS", SimpleNamespace(define=defined.append))
    assert import_torchvision() == "the module"
    assert importing.names == ["torchvision", "torchvision"]
    assert [*modules] == ["torch", "torchvisions"]  # half imported, they would stay so
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert defined == [f"nms{arguments}", f"qnms{arguments}"]


def test_any_other_error_of_torchvision_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "importlib", Importing(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="^out of memory$"):
        import_torchvision()
