"""A base's file: what it holds, where it is looked for, and every refusal in a whole sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.files import read_tensors, write_tensors
from vitft.model import checkpoint
from vitft.model.checkpoint import BUNDLED, find_base, is_foreign, is_library_folder

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def model(**options: Any) -> VisionTransformer:
    made = VisionTransformer(ViTConfig(**TINY | {"n_classes": 2} | options))
    made.classes, made.mean, made.std = ("cat", "dog"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    made.facts = {"licence": "MIT"}
    return made.eval()


def test_a_file_tells_all_that_an_image_needs(tmp_path: Path) -> None:
    one, path = model(head_bias=False), tmp_path / "a"
    one.resize(12)
    save_model(one, path)
    tensors, metadata = read_tensors(path)
    assert tensors.keys() == one.state_dict().keys()
    assert metadata["config"]["head_bias"] is False
    assert metadata["classes"] == ["cat", "dog"]
    assert metadata["facts"] == {"licence": "MIT"}
    assert metadata["preprocessing"] == {
        "image_size": 12,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "resize": "shortest",
        "crop": 1.0,
        "kernel": "bicubic",
        "range": None,
        "halves": "even",
        "labels": "one",
    }
    other = load_model(path)
    assert (other.image_size, other.classes, other.facts) == (12, one.classes, one.facts)
    assert (other.mean, other.std, other.config) == (one.mean, one.std, one.config)
    assert not other.training
    assert all(p.requires_grad for p in other.parameters())
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(one(images), other(images))


def test_a_head_without_a_bias_stays_without_after_a_new_one_with(tmp_path: Path) -> None:
    one = model(head_bias=False)
    one.new_head(("a", "b", "c"))
    save_model(one, tmp_path / "a")
    config = load_model(tmp_path / "a").config
    assert (config.n_classes, config.head_bias) == (3, True)


def test_a_model_that_is_no_plain_base_is_not_saved(tmp_path: Path) -> None:
    one = model()
    one.classes = ("cat",)
    message = "^1 class names do not fit 2 logits; set model.classes$"
    with pytest.raises(ValueError, match=message):
        save_model(one, tmp_path / "a")
    one = model()
    one.register_buffer("b", torch.ones(1))
    one.register_buffer("a", torch.ones(1))
    message = r"^the model is no plain base, it holds a; adapters\.merge\(model\) first$"
    with pytest.raises(ValueError, match=message):
        save_model(one, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def drop(key: str) -> Change:
    return lambda tensors, metadata: metadata.pop(key)


REFUSED: list[tuple[Change, str]] = [
    *(
        (drop(key), f"{{}} is no vitft base: its metadata lacks {key}")
        for key in ("config", "classes", "preprocessing")
    ),
    (lambda t, m: m.clear(), "{} is no vitft base: its metadata lacks classes"),
    (
        lambda t, m: m["preprocessing"].pop("std"),
        "{}: preprocessing: Object missing required field std",
    ),
    (
        lambda t, m: m["preprocessing"].pop("mean"),
        "{}: preprocessing: Object missing required field mean",
    ),
    (
        lambda t, m: m.update(classes=None),
        "{}: classes: Expected array, got null",
    ),
    *(
        (change, "{}: its class names do not fit its config, or one is there twice")
        for change in (
            lambda t, m: m["classes"].append("owl"),
            lambda t, m: m["classes"].__setitem__(1, m["classes"][0]),
        )
    ),
    (lambda t, m: m.update(classes=[1, 2, 3]), "{}: classes[0]: Expected str, got int"),
    (lambda t, m: m.update(facts=[1]), "{}: facts: Expected object, got array"),
    (lambda t, m: m["config"].update(dim="16"), "{}: config.dim: Expected int, got str"),
    (lambda t, m: m.update(more={}), "{}: 'more' is unknown"),
    (
        lambda t, m: m["preprocessing"].update(mean=[0.1], std=[0.1]),
        "{}: mean=(0.1,) and std=(0.1,) are not for 3 channels",
    ),
    (
        lambda t, m: m["facts"].update(a=[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]),
        "{}: values are nested more than 20 deep",
    ),
    (lambda t, m: t.pop("norm.bias"), "{} lacks tensor norm.bias"),
    (lambda t, m: t.update(a=torch.ones(1)), "{} has an unexpected tensor a"),
    (
        lambda t, m: t.update({"norm.bias": torch.zeros(3)}),
        "{}: tensor norm.bias has shape (3,), not (16,)",
    ),
    (
        lambda t, m: t["norm.bias"][3].fill_(-2e10),
        "{}: tensor norm.bias has a value of 2e+10; it is damaged",
    ),
    (
        lambda t, m: t["norm.bias"][3].fill_(torch.nan),
        "{}: tensor norm.bias has values that are not finite",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_a_whole_sentence(
    tmp_path: Path, change: Change, message: str
) -> None:
    path = tmp_path / "base.safetensors"
    save_model(model(), path)
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(path))}$"):
        load_model(path)


def test_what_older_files_lack_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_model(model(), path)
    tensors, metadata = read_tensors(path)
    del metadata["facts"], metadata["preprocessing"]["image_size"]
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_tensors(path, tensors, metadata)
    found = load_model(str(path))
    assert (found.facts, found.image_size) == ({}, 8)
    assert {p.dtype for p in found.parameters()} == {torch.float32}


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bases"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "BUNDLED", folder)
    return folder


def test_a_base_is_a_file_or_a_runs_file_or_one_of_the_bundled(
    tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        "^there is no base x: neither a file, nor a run's folder, nor a bundled base "
        r"\(none yet\)$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        find_base("x")
    for name in ("x", "b", "a"):
        (bundled / f"{name}.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"bundled base \(a, b, x\)$"):
        find_base("y")
    assert find_base("x") == bundled / "x.safetensors"
    Path("x").mkdir()
    assert find_base("x") == bundled / "x.safetensors"
    Path("x/model.safetensors").touch()
    assert find_base("x") == Path("x/model.safetensors")
    Path("x/config.json").write_text("{}")  # of a run
    assert find_base("x") == Path("x/model.safetensors")
    Path("x/config.json").write_text('{"model_type": "vit"}')
    assert find_base("x") == Path("x")
    assert BUNDLED.name == "bases"
    assert (BUNDLED / "cifar10.safetensors").is_file()


def test_an_adapters_folder_is_told_from_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    message = f"^{tmp_path} holds an adapter, no base; vitft merge makes one of it$"
    with pytest.raises(FileNotFoundError, match=message):
        find_base(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"config.json": '{"model_type": "vit"}'}, True),
        ({"config.json": '{"architecture": "vit_base"}'}, True),
        ({"config.json": '{"epochs": 3}'}, False),
        ({"config.json": "no json"}, False),
        ({"config.json": "3"}, False),
        ({"config.json": "[" * 100_000}, False),
        ({"config.json": '{"model_type": "vit"}', "adapter_config.json": "{}"}, False),
        ({"weights.pth": ""}, True),
        ({"open_clip_model.safetensors": ""}, True),
        ({"model.safetensors": ""}, False),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_librarys_folder_is_known_by_its_files(
    tmp_path: Path, files: dict[str, str], expected: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert is_library_folder(tmp_path) is expected


@pytest.mark.parametrize("name", ["base.pt", "base.pth", "base.bin"])
def test_a_base_is_not_saved_as_what_it_could_not_be_read_as(tmp_path: Path, name: str) -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    with pytest.raises(ValueError, match=r"let its name end in \.safetensors"):
        save_model(model, tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_a_librarys_file_is_known_by_its_kind(tmp_path: Path) -> None:
    for suffix, expected in ((".pth", True), (".pt", True), (".bin", True), (".txt", False)):
        assert is_foreign(tmp_path / f"a{suffix}") is expected
    path = tmp_path / "a.safetensors"
    assert not is_foreign(path)  # its reader says that it is not there
    path.write_text("a text")
    assert not is_foreign(path)
    save_file({"x": torch.ones(1)}, path)
    assert is_foreign(path)
    save_file({"x": torch.ones(1)}, path, {"format": "pt"})
    assert is_foreign(path)
    save_file({"x": torch.ones(1)}, path, {"vitft": json.dumps({})})
    assert not is_foreign(path)
