"""Whatever a file says: it loads, or one ValueError names what is wrong; nothing is allocated."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import METHODS, LoRAConfig, folder, inject, load_adapter, save_adapter
from adapters.folder import CONFIG, TENSORS
from tests.adapters.toy import config, toy
from tests.shared import TINY, long, some
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

SOME = some([*METHODS], 6)

ODD: list[Any] = [
    *(True, False, None, -1, 0, 3, 2.5, 10**30, float("inf"), float("nan")),
    *("", "8", "wq", "(", [], [1], ["wq", 3], [[]], {}, {"wq": 1}, {"wq": "x"}, {"(": 1}),
]


def saved(method: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save an adapter as vitft 0.1 did; return its config, and the tensors' metadata."""
    save_adapter(inject(toy(), config(method), trainable=("head",)), folder)
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = json.loads(file.metadata()["adapters"])
    del metadata["config"]
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"adapters": json.dumps(metadata)})
    return json.loads((folder / CONFIG).read_text()), metadata


def loads_or_says(folder: Path) -> str:
    """Return what is wrong with a folder, "" where it loads."""
    said = ""
    try:
        load_adapter(toy(), folder)
    except ValueError as error:
        said = str(error)
    assert said.startswith(str(folder)) or not said
    assert "\n" not in said
    return said


@long
@pytest.mark.parametrize("method", SOME)
def test_an_odd_value_of_a_config_loads_or_is_named(method: str, tmp_path: Path) -> None:
    written, _ = saved(method, tmp_path)
    refused = 0
    for key in [*written, "layers_to_transform", "layers_pattern", "exclude_modules", "bias"]:
        for value in ODD:
            (tmp_path / CONFIG).write_text(json.dumps(written | {key: value}))
            refused += bool(loads_or_says(tmp_path))
    assert refused > 30
    for content in ([], 3, None, "x"):
        (tmp_path / CONFIG).write_text(json.dumps(content))
        assert loads_or_says(tmp_path)


@long
@pytest.mark.parametrize("method", SOME)
def test_an_odd_value_of_the_metadata_loads_or_is_named(method: str, tmp_path: Path) -> None:
    _, metadata = saved(method, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    refused = 0
    for key in [*metadata, "options", "preprocessing", "classes", "config"]:
        for value in [*ODD, {"rank": 3}, {"nothing": 1}]:
            text = json.dumps(metadata | {key: value})
            save_file(tensors, tmp_path / TENSORS, {"adapters": text})
            refused += bool(loads_or_says(tmp_path))
    for text in ("[]", "3", "null", "{", "{}x", "[" * 100_000):
        save_file(tensors, tmp_path / TENSORS, {"adapters": text})
        assert loads_or_says(tmp_path)
    assert refused > 20


@pytest.mark.parametrize(
    ("change", "extra"),
    [
        ({"r": 10**9}, {}),
        ({"r": 10**9}, {"base_model.model.x": torch.empty(0, 10**9)}),
        ({"rank_pattern": {"blocks.1.*": 10**9}}, {}),
    ],
)
def test_a_size_that_no_tensor_has_allocates_nothing(
    change: dict[str, Any], extra: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    written, metadata = saved("lora", tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(written | change))
    text = {"adapters": json.dumps(metadata)}
    save_file(load_file(tmp_path / TENSORS) | extra, tmp_path / TENSORS, text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "rank is 1000000000 for 'blocks." in loads_or_says(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"image_size": 8, "mean": [0.5], "std": [0.5]},
        {"image_size": "x", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"image_size": 7, "mean": [0.5] * 3, "std": [0.5] * 3},
        {"image_size": 8, "mean": 3, "std": [0.5] * 3},
    ],
)
def test_a_damaged_record_of_preprocessing_leaves_the_base_as_it_was(
    record: dict[str, Any], tmp_path: Path
) -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    save_adapter(inject(model, None, trainable=("head",)), tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        metadata = json.loads(file.metadata()["adapters"])
    text = {"adapters": json.dumps(metadata | {"preprocessing": record})}
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, text)
    base = VisionTransformer(ViTConfig(**TINY))
    before = base.preprocessing, [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=TENSORS):
        load_adapter(base, tmp_path)
    assert (base.preprocessing, [name for name, _ in base.named_modules()]) == before
    assert "_injection" not in vars(base)


@pytest.mark.parametrize("first", [{"alpha": 4.0}, {"targets": ("wq", "wk")}, {"use_rslora": True}])
def test_files_of_two_saves_are_never_taken_together(first: dict[str, Any], tmp_path: Path) -> None:
    for name, options in (("old", first), ("new", {})):
        model = inject(toy(), LoRAConfig(**{"targets": ("wq",), "rank": 2} | options))
        save_adapter(model, tmp_path / name)
    (tmp_path / "old" / CONFIG).replace(tmp_path / "new" / CONFIG)
    with pytest.raises(ValueError, match=r"it was saved with .*, but adapter_config.json says .*"):
        load_adapter(toy(), tmp_path / "new")


def test_a_folder_that_is_saved_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(rank: int) -> None:
        save_adapter(inject(toy(), LoRAConfig(targets=("wq",), rank=rank)), tmp_path)

    def saving(*given: Any) -> Any:
        if not saved:  # between the two files
            saved.append(save(rank=4))
        return parsed(*given)

    saved: list[None] = []
    parsed = folder._parsed
    save(rank=2)
    monkeypatch.setattr(folder, "_parsed", saving)
    assert folder.read_adapter(tmp_path).config["r"] == 4


def test_what_changes_no_function_may_be_edited_by_hand(tmp_path: Path) -> None:
    save_adapter(inject(toy(), LoRAConfig(targets=("wq",)), trainable=("head",)), tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    edits = {"base_model_name_or_path": "mine", "inference_mode": True, "peft_version": "0.18"}
    (tmp_path / CONFIG).write_text(json.dumps(written | edits))
    load_adapter(toy(), tmp_path)
