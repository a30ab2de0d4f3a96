"""Adapter folders: what is written, what comes back, and everything that is refused."""

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters import (
    LoRAConfig,
    disabled,
    eject,
    fingerprint,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from adapters.folder import read_adapter
from tests.adapters.toy import (
    CONVERTED,
    KINDS,
    WRAPPERS,
    X,
    adapted,
    config,
    every_kind,
    fit,
    snapshot,
    toy,
)
from vitft.model.vit import VisionTransformer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.blocks.0.attn.wq.lora_A.weight"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change what an adapter_config.json says, as if it had been saved so."""
    written = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(written))
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = json.loads(file.metadata()["adapters"])
    del metadata["config"]
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"adapters": json.dumps(metadata)})


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    with safe_open(folder / TENSORS, framework="pt") as file:
        save_file(tensors, folder / TENSORS, metadata=file.metadata())


@every_kind
def test_a_saved_adapter_comes_back_exactly(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.classes = ("x", "y", "z")
    save_adapter(model, tmp_path / "new" / "folder")
    base = toy()
    loaded = load_adapter(base, tmp_path / "new" / "folder")
    assert loaded is base
    atol = 1e-12 if kind in CONVERTED else 0.0  # to a plain LoRA of twice the rank
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=atol)
    assert loaded.classes == ("x", "y", "z")
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@every_kind
def test_what_is_loaded_can_be_saved_switched_off_ejected_and_merged(
    kind: str, tmp_path: Path
) -> None:
    save_adapter(adapted(kind), tmp_path / "one")
    model = load_adapter(toy(), tmp_path / "one")
    save_adapter(model, tmp_path / "two")
    assert [(tmp_path / "one" / name).read_bytes() for name in (CONFIG, TENSORS)] == [
        (tmp_path / "two" / name).read_bytes() for name in (CONFIG, TENSORS)
    ]
    expected = model(X)
    with disabled(model):
        assert torch.equal(model(X), toy()(X))
    if kind not in WRAPPERS:
        torch.testing.assert_close(merge(model)(X), expected, rtol=0, atol=1e-12)
    assert torch.equal(eject(load_adapter(toy(), tmp_path / "one"))(X), toy()(X))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CONVERTED])
def test_loading_to_train_goes_on_as_if_never_saved(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    save_adapter(model, tmp_path)
    loaded = load_adapter(toy(), tmp_path, train=True)
    fit(model)
    fit(loaded)
    assert torch.equal(loaded(X), model(X))


@every_kind
def test_a_head_of_another_width_travels_with_its_classes(kind: str, tmp_path: Path) -> None:
    model = toy()
    model.head, model.classes = nn.Linear(8, 7).double(), tuple("abcdefg")
    save_adapter(inject(model, config(kind), trainable=("head",)), tmp_path)
    loaded = load_adapter(toy(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=1e-14)
    assert loaded.classes == tuple("abcdefg")
    assert loaded.head.out_features == 7
    with disabled(loaded):
        assert torch.equal(loaded(X), toy()(X))
        assert loaded.classes == ("a", "b", "c")
    assert eject(loaded).classes == ("a", "b", "c")


@every_kind
def test_an_adapter_is_loaded_in_the_dtype_of_the_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    save_adapter(model, tmp_path)
    loaded = load_adapter(toy().float(), tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(X.float()), model(X).float())


def test_a_head_alone_comes_back_and_leaves_no_config(tmp_path: Path) -> None:
    model = inject(toy(), None, trainable=("head",))
    fit(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(toy(), tmp_path)(X), model(X))
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "modules_to_save": ["head"],
        "peft_type": "LINEAR",
        "task_type": None,
    }


def test_the_files_are_small_known_and_alone(tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": ["head"],
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["wq", "attn.wv", "blocks.1.ffn.0"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    saved = read_adapter(tmp_path)
    assert {A, "base_model.model.head.bias"} < saved.tensors.keys()
    assert len(saved.tensors) == 12
    assert saved.fingerprint == fingerprint(toy(), exclude=("head",))
    assert saved.classes == ("a", "b", "c")


def test_a_model_without_classes_saves_none(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    save_adapter(inject(model, LoRAConfig(targets=("0",))), tmp_path)
    assert read_adapter(tmp_path).classes is None
    assert not hasattr(load_adapter(eject(model), tmp_path), "classes")


def test_saving_needs_an_adapter_that_is_switched_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(toy(), tmp_path)
    model = adapted("lora")
    with disabled(model), pytest.raises(ValueError, match="the adapters are switched off"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*file/adapter_model.safetensors: "):
        save_adapter(adapted("lora"), tmp_path / "file")


def test_a_failed_save_keeps_the_old_files_whole(tmp_path: Path, monkeypatch: Any) -> None:
    save_adapter(adapted("lora"), tmp_path)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"cannot write .*{TENSORS}: No space left on device"):
        save_adapter(adapted("lora", seed=1), tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def drop(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(A), f"tensor {A} is missing"),
        (drop("base_model.model.head.bias"), "tensor base_model.model.head.bias is missing"),
        (put("base_model.model.head.scale", torch.ones(3)), "head.scale is unexpected"),
        (put(A, torch.ones(4, 8)), rf"rank is 8 for '.*wq', but tensor {A} has shape \[4, 8\]"),
        (
            put("base_model.model.head.weight", torch.ones(3, 9)),
            r"has shape \[3, 9\], not \[3, 8\]",
        ),
        (put(A, torch.full((8, 8), -2e10)), rf"tensor {A} has a value of 2e\+10; it is damaged"),
        (put(A, torch.full((8, 8), torch.nan)), f"tensor {A} has values that are not finite"),
        (put(A, torch.ones(8, 8, dtype=torch.int8)), f"tensor {A} is of torch.int8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    save_adapter(adapted("lora"), tmp_path)
    edit_tensors(tmp_path, change)
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "BOFT"}, "peft_type='BOFT' is none that is known: lora, dora"),
        ({"peft_type": None}, "peft_type=None is none that is known"),
        ({"rank_pattern": {"wz": 4}}, "pattern 'wz' matches none of the targets"),
        ({"exclude_modules": ["wq"]}, "tensor base_model.model.blocks.0.attn.wq.* is unexpected"),
        ({"lora_bias": True}, "option lora_bias=True is not supported"),
        ({"bias": "all"}, "option bias='all' is not supported"),
        ({"fan_in_fan_out": True}, "option fan_in_fan_out=True"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "blocks.1.* is unexpected"),
        ({"exclude_modules": "("}, "'\\(' is no regular expression"),
        ({"exclude_modules": 3}, "exclude_modules: Expected str .*, got int"),
        (
            {"layers_to_transform": 1.5},
            "layers_to_transform: Expected int .*, got float",
        ),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform\[0\]: Expected int, got str"),
        ({"modules_to_save": [1]}, r"modules_to_save\[0\]: Expected str, got int"),
        ({"use_rslora": "no"}, "option use_rslora='no' is neither true nor false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
        ({"use_dora": True}, "the file is of the method 'lora', the config of 'dora'"),
        ({"r": 0}, "rank=0 is not a positive integer"),
        ({"r": 10**9}, r"rank is 1000000000 for '.*wq', but tensor .* has shape \[8, 8\]"),
        ({"rank_pattern": {"wq": 10**9}}, r"rank is 1000000000 for 'blocks.0.attn.wq', but"),
        ({"lora_alpha": 1e999}, "alpha=inf is not positive"),
        ({"r": 4}, r"rank is 4 for .*, but tensor .*lora_A.weight has shape \[8, 8\]"),
        ({"lora_alpha": "16"}, "alpha='16' is not a number"),
        ({"target_modules": ["query"]}, r"target_modules \['query'\] is no module of this model"),
        ({"target_modules": "(["}, r"'\(\[' is no regular expression"),
        ({"target_modules": "all-linear"}, "target_modules 'all-linear' is no module"),
        ({"target_modules": r"(([a-z0-9]+\.?)+)+!"}, "is no module of this model"),
        ({"target_modules": ".*" * 14 + "!"}, "is no module of this model"),
        ({"rank_pattern": {"(a|a)*" * 9 + "!": 4}}, "matches none of the targets"),
        ({"exclude_modules": r"(w)\1"}, "has a groupref, which is not covered"),
        ({"target_modules": None}, r"target_modules \(\) is no module of this model"),
        ({"target_modules": 3}, "target_modules: Expected str .*, got int"),
        ({"modules_to_save": ["haed"]}, "modules_to_save 'haed' is no module with"),
        ({"modules_to_save": "head"}, "modules_to_save 'head' is one string"),
        ({"modules_to_save": None}, "tensor base_model.model.head.bias is unexpected"),
    ],
)
def test_an_option_that_does_not_fit_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(adapted("lora"), tmp_path)
    edit_config(tmp_path, **changes)
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


@every_kind
def test_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    save_adapter(adapted(kind), tmp_path)
    expected, found = (fingerprint(toy(seed), exclude=("head",)) for seed in (0, 1))
    message = (
        f": trained on the base {expected}, but this one is {found}; load that base, and cast it "
        "to another dtype only afterwards$"
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(toy(1), tmp_path)
    base = toy(1)
    base.load_state_dict({k: t for k, t in toy().state_dict().items() if "head" not in k}, False)
    torch.testing.assert_close(
        load_adapter(base, tmp_path)(X), adapted(kind)(X), rtol=0, atol=1e-12
    )


def test_an_adapted_model_is_not_loaded_into(tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    with pytest.raises(ValueError, match="the model is adapted already"):
        load_adapter(adapted("lora"), tmp_path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_or_broken_file_is_named(name: str, tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    content = (tmp_path / name).read_bytes()
    for broken in (b"", content[:-9], b"[]", b"\xff" * 20):
        (tmp_path / name).write_bytes(broken)
        message = f"^{re.escape(str(tmp_path / name))} is broken: "
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(toy(), tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no adapter: {name} is missing"):
        load_adapter(toy(), tmp_path)


def test_preprocessing_travels_with_the_adapter(tiny: VisionTransformer, tmp_path: Path) -> None:
    base, of_base = copy.deepcopy(tiny), tiny.preprocessing
    tiny.framing = replace(tiny.framing, resize="pad")
    save_adapter(inject(tiny, config("lora", targets=("wq",)), trainable=("head",)), tmp_path)
    loaded = load_adapter(base, tmp_path)
    assert loaded.preprocessing == tiny.preprocessing != of_base
    assert eject(loaded).preprocessing == of_base


def test_a_model_that_prepares_nothing_takes_no_preprocessing(tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    plain = read_adapter(tmp_path)
    loaded = load_adapter(toy(), replace(plain, preprocessing={"size": 8}))
    assert not hasattr(loaded, "preprocessing")
    asking = toy()
    asking.preprocessing = {"size": 9}
    assert load_adapter(asking, plain).preprocessing == {"size": 9}


def test_eject_gives_the_modes_from_before_loading_back(tmp_path: Path) -> None:
    save_adapter(adapted("lora"), tmp_path)
    base = toy().train()
    base.blocks[0].eval()
    before = {name: module.training for name, module in base.named_modules()}
    loaded = load_adapter(base, tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert {name: m.training for name, m in eject(loaded).named_modules()} == before


def test_tied_parts_of_a_trained_module_come_back_tied(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        both = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        both[1].weight = both[0].weight
        return nn.ModuleDict({"a": nn.Linear(8, 8), "both": both})

    model = inject(base(), LoRAConfig(targets=("a",), rank=1), trainable=("both",))
    with torch.no_grad():
        model["both"][0].weight.normal_()
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path)["both"]
    assert loaded[0].weight is loaded[1].weight
    assert torch.equal(loaded[1].weight, model["both"][0].weight)
