"""PEFT reads what we write, and we read what PEFT writes, to 1e-5."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS, inject, load_adapter, save_adapter
from tests.adapters.toy import KINDS, X, adapted, config, fit, move, toy

TARGETS = ["wq", "attn.wv", "blocks.1.ffn.0"]
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
PATTERNS = {
    "rank_pattern": {"ffn.0": 2, r"blocks\.0\..*": 3},
    "alpha_pattern": {r"^blocks\.1\..*wq": 5},
}
PEFT = {  # kind: PEFT's config, its options
    "lora": (peft.LoraConfig, LORA),
    "rslora": (peft.LoraConfig, LORA | {"use_rslora": True}),
    "dora": (peft.LoraConfig, LORA | {"use_dora": True}),
    "patterns": (peft.LoraConfig, LORA | PATTERNS),
    "vera": (peft.VeraConfig, {"r": 5}),
    "vera unsaved": (peft.VeraConfig, {"r": 5, "save_projection": False}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "ia3 of inputs": (peft.IA3Config, {"feedforward_modules": ["attn.wv", "blocks.1.ffn.0"]}),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 6, "rank_pattern": {"wq": 2}}),
    "lokr": (peft.LoKrConfig, {"r": 3, "alpha": 5}),
    "lokr of thin": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4},
    ),
    "norm": (peft.LNTuningConfig, {"target_modules": ["norm"]}),
}
OURS_ALONE = {"ssf", "bitfit", "adaptformer", "adapterplus", "vpt"}
every_peft = pytest.mark.parametrize("kind", PEFT)
every_shared = pytest.mark.parametrize("kind", [k for k in KINDS if k not in OURS_ALONE])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not (load|save):UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert one.std() > 0.01


def by_peft(kind: str, folder: Path, **options: Any) -> nn.Module:
    """Return a model that PEFT adapted at random and saved to `folder`."""
    config, own = PEFT[kind]
    settings = {"target_modules": TARGETS, "modules_to_save": ["head"]} | own | options
    model = peft.get_peft_model(toy(), config(**settings), autocast_adapter_dtype=False)
    move(model)
    model.eval().save_pretrained(folder)
    return model


@every_peft
def test_we_load_what_peft_saves(kind: str, tmp_path: Path) -> None:
    model = by_peft(kind, tmp_path)
    close(load_adapter(toy(), tmp_path)(X), model(X))


@every_shared
def test_peft_loads_what_we_save(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(toy(), tmp_path)
    close(theirs(X), model(X))
    theirs.save_pretrained(tmp_path / "again")
    close(load_adapter(toy(), tmp_path / "again")(X), model(X))


def test_every_method_is_peft_s_or_ours_alone() -> None:
    assert {KINDS[kind][0] for kind in PEFT} == METHODS.keys() - OURS_ALONE


@every_shared
def test_peft_adapts_the_layers_that_we_do(kind: str, tmp_path: Path) -> None:
    targets = [target.removeprefix("blocks.1.") for target in config(kind).targets]
    model = inject(toy(), config(kind, targets=targets, layers=(1,)))
    move(model)
    save_adapter(model.eval(), tmp_path)
    close(peft.PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))
    close(load_adapter(toy(), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.attn\.w[qv]"},
        {"target_modules": "all-linear"},
        {"target_modules": ["head", "wq"]},
        {"exclude_modules": ["blocks.1.ffn.0"]},
        {"target_modules": ["wq", "ffn.0"], "exclude_modules": r".*0\.attn.*"},
        {"target_modules": r".*\.attn\.w[qv]", "exclude_modules": ["0.attn.wv"]},
        {"layers_to_transform": 0, "layers_pattern": "blocks"},
        {"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
        {"layers_to_transform": [1]},
    ],
)
def test_targets_mean_what_they_mean_to_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = by_peft("lora", tmp_path, r=3, **options)
    close(load_adapter(toy(), tmp_path)(X), model(X))
    save_adapter(load_adapter(toy(), tmp_path), tmp_path / "again")
    close(load_adapter(toy(), tmp_path / "again")(X), model(X))


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [(kind, {}) for kind in PEFT]
    + [
        ("lora", {"lora_dropout": 0.5}),
        ("dora", {"lora_dropout": 0.5}),
        ("vera", {"vera_dropout": 0.5}),
    ],
)
def test_gradients_are_those_of_peft(kind: str, dropout: dict[str, float], tmp_path: Path) -> None:
    theirs = by_peft(kind, tmp_path, **dropout).train()
    ours = load_adapter(toy(), tmp_path, train=True).train()
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        output = model(X)
        output.square().sum().backward()
        trained = [p.grad for n, p in model.named_parameters() if p.grad is not None]
        gradients.append(sorted(gradient.norm().item() for gradient in trained))
    assert gradients[1] == pytest.approx(gradients[0], abs=1e-9)


@every_peft
def test_training_follows_peft(kind: str, tmp_path: Path) -> None:
    theirs = by_peft(kind, tmp_path).train()
    ours = load_adapter(toy(), tmp_path, train=True).train()
    fit(theirs)
    fit(ours)
    torch.testing.assert_close(ours(X), theirs(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base_train_as_in_peft(init: str, tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": init}
    theirs = peft.get_peft_model(
        toy().float(), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    )
    ours = inject(toy().float(), config("lora", rank=2, alpha=3, init=init))
    for model in (theirs.double(), ours.double()):  # PEFT starts in no other than float32
        fit(model)
    close(ours(X), theirs(X))
    save_adapter(ours, tmp_path)
    base = toy().float().double()
    close(peft.PeftModel.from_pretrained(base, tmp_path)(X), theirs(X))


def test_an_option_of_peft_that_we_lack_is_refused(tmp_path: Path) -> None:
    by_peft("lora", tmp_path, bias="all")
    with pytest.raises(ValueError, match="option bias='all' is not supported by LoRA"):
        load_adapter(toy(), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(written) > 30
