"""Folders of another library's model under the names of the converted one."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.folder import PREFIX, AdapterFolder
from adapters.translate import translated

NAMES = {
    "encoder.0.qkv": ("blocks.0.wq", "blocks.0.wk", "blocks.0.wv"),
    "encoder.0.fc": ("blocks.0.w1",),
    "classifier": ("head",),
}


class Converted(nn.Module):
    """Has its own names for the library's modules."""

    def __init__(self) -> None:
        super().__init__()
        own = ["wq", "wk", "wv", "w1"]
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(2, 2) for n in own})])
        self.head = nn.Linear(2, 2)

    def translate(self, name: str) -> tuple[str, ...]:
        return NAMES.get(name, ())


def folder(tensors: dict[str, Tensor], **config: Any) -> AdapterFolder:
    written = {
        "peft_type": "LORA",
        "r": 1,
        "target_modules": ["qkv"],
        "layers_pattern": "x",
    } | config
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    return AdapterFolder(config=written, tensors=named, fingerprint=None, classes=None)


A, B = torch.randn(1, 2), torch.arange(6.0).view(6, 1)
LORA = {"encoder.0.qkv.lora_A.weight": A, "encoder.0.qkv.lora_B.weight": B}
WHOLE = {"classifier.weight": torch.ones(2, 2), "classifier.bias": torch.zeros(2)}


def test_fused_updates_give_each_module_its_rows() -> None:
    found = translated(folder(LORA | WHOLE, layers_to_transform=[0]), Converted())
    expected = {"head.weight": WHOLE["classifier.weight"], "head.bias": WHOLE["classifier.bias"]}
    for i, name in enumerate(("wq", "wk", "wv")):
        expected[f"blocks.0.{name}.lora_A.weight"] = A
        expected[f"blocks.0.{name}.lora_B.weight"] = B[2 * i : 2 * i + 2]
    assert found.tensors.keys() == {PREFIX + name for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[PREFIX + name], tensor)
    assert found.trained == ("head",)
    assert found.config == {
        "peft_type": "LORA",
        "r": 1,
        "target_modules": [f"blocks.0.{name}" for name in ("wq", "wk", "wv")],
        "modules_to_save": ["head"],
        "task_type": None,
    }


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [("lora_magnitude_vector", torch.arange(6.0)), ("ia3_l", torch.arange(6.0).view(6, 1))],
)
def test_vectors_of_outputs_are_cut_and_those_of_one_module_kept(
    suffix: str, tensor: Tensor
) -> None:
    tensors = {f"encoder.0.qkv.{suffix}": tensor, f"encoder.0.fc.{suffix}": tensor}
    found = translated(folder(tensors), Converted())
    for i, name in enumerate(("wq", "wk", "wv")):
        part = found.tensors[f"{PREFIX}blocks.0.{name}.{suffix}"]
        assert torch.equal(part, tensor[2 * i : 2 * i + 2])
    assert torch.equal(found.tensors[f"{PREFIX}blocks.0.w1.{suffix}"], tensor)
    assert found.config["modules_to_save"] is None
    assert found.trained == ()


def test_a_folder_that_needs_no_translation_is_given_as_it_is() -> None:
    model = Converted()
    ours = {"blocks.0.wq.lora_A.weight": A, "blocks.0.wq.lora_B.weight": B[:2]}
    for saved in (folder(ours), folder({}), folder(WHOLE)):
        assert translated(saved, model) is saved
    vectors = folder({"blocks.0.wq.ia3_l": B[:2]})
    assert translated(vectors, model) is vectors
    plain = folder(LORA)
    assert translated(plain, nn.Linear(2, 2)) is plain  # which translates nothing
    written = AdapterFolder(
        config={}, tensors=plain.tensors, fingerprint=None, classes=None, method="lora"
    )
    assert translated(written, model) is written


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    for name in ("encoder.9.qkv.lora_A.weight", "encoder.0.qkv.lora_E.weight", "qkv"):
        message = f"^tensor {PREFIX}{name} has no counterpart in the converted model$"
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            translated(folder(LORA | {name: A}), Converted())
    assert translated(folder(LORA, rank_pattern={}), Converted()).trained == ()


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_the_library_become_an_entry_for_each_of_our_modules(key: str) -> None:
    found = translated(folder(LORA, **{key: {"proj": 3, "q.v": 2, "qkv": 5}}), Converted())
    targets = found.config["target_modules"]
    assert targets
    assert found.config[key] == dict.fromkeys(targets, 2)
    assert translated(folder(LORA, **{key: {"other": 2}}), Converted()).config[key] == {}


def test_factors_of_inputs_are_the_same_for_all_parts() -> None:
    tensors = {"encoder.0.qkv.ia3_l": torch.ones(1, 2), "encoder.0.fc.ia3_l": torch.ones(2, 1)}
    found = translated(folder(tensors, feedforward_modules=["qkv"]), Converted())
    expected = [f"blocks.0.{name}" for name in ("wq", "wk", "wv")]
    assert found.config["feedforward_modules"] == expected
    assert all(found.tensors[f"{PREFIX}{name}.ia3_l"].shape == (1, 2) for name in expected)


def test_the_config_tells_which_side_one_factor_is_of() -> None:
    tensors = {"encoder.0.fc.ia3_l": torch.ones(1, 1)}
    for given in (["fc"], r".*\.fc"):
        config = translated(folder(tensors, feedforward_modules=given), Converted()).config
        assert config["feedforward_modules"] == ["blocks.0.w1"]
    config = translated(folder(tensors, feedforward_modules=["qkv"]), Converted()).config
    assert config["feedforward_modules"] == []


def test_a_name_that_both_models_have_is_no_sign_that_all_are_ours() -> None:
    shared = {"head.lora_A.weight": A, "head.lora_B.weight": B[:2]}
    names = NAMES | {"head": ("head",)}
    model = Converted()
    model.translate = lambda name: names.get(name, ())  # type: ignore[method-assign]
    found = translated(folder(LORA | shared), model)
    assert found.config["target_modules"] == ["blocks.0.wq", "blocks.0.wk", "blocks.0.wv", "head"]


@pytest.mark.parametrize(
    ("suffix", "tensor", "told"),
    [
        ("hada_w1_a", torch.ones(6, 1), "has no parts for blocks.0.wq, blocks.0.wk, blocks.0.wv"),
        ("lora_magnitude_vector", torch.ones(7), "has shape [7], not 3 equal parts"),
        ("lora_magnitude_vector", torch.ones(()), "has shape [], not 3 equal parts"),
    ],
)
def test_what_has_no_parts_is_refused_by_name(suffix: str, tensor: Tensor, told: str) -> None:
    name = f"encoder.0.qkv.{suffix}"
    with pytest.raises(ValueError, match=f"^{re.escape(f'tensor {PREFIX}{name} {told}')}$"):
        translated(folder({name: tensor}), Converted())
