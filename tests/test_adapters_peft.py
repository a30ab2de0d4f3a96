"""PEFT reads what we write, and we read what PEFT writes, to 1e-5."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_toy import Toy, X, adapted, config, fit, move, toy
from torch import Tensor, nn

from adapters import METHODS, inject, load_adapter, save_adapter

every_method = pytest.mark.parametrize("method", METHODS)
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
every_kind = pytest.mark.parametrize("kind", OPTIONS)
TARGETS = ["wq", "attn.wv", "blocks.1.ffn.0"]


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert one.std() > 0.01


def by_peft(folder: Path, base: Toy | None = None, **options: Any) -> nn.Module:
    """Return a model that PEFT adapted at random and saved to `folder`."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
    settings |= {"modules_to_save": ["head"], "init_lora_weights": False} | options
    model = peft.get_peft_model(
        base or toy(), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    )
    move(model)
    model.eval().save_pretrained(folder)
    return model


@every_kind
def test_we_load_what_peft_saves(kind: str, tmp_path: Path) -> None:
    model = by_peft(tmp_path, **OPTIONS[kind])
    close(load_adapter(toy(), tmp_path)(X), model(X))


@every_kind
def test_peft_loads_what_we_save(kind: str, tmp_path: Path) -> None:
    method = "dora" if kind == "dora" else "lora"
    options = {"use_rslora": True} if kind == "rslora" else {}
    model = inject(toy(), config(method, **options), trainable=("head",))
    move(model)
    save_adapter(model.eval(), tmp_path)
    close(peft.PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))


@every_method
def test_peft_adapts_the_layers_that_we_do(method: str, tmp_path: Path) -> None:
    model = inject(toy(), METHODS[method](targets=("wq", "wv"), layers=(1,)))
    move(model)
    save_adapter(model.eval(), tmp_path)
    close(peft.PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))
    close(load_adapter(toy(), tmp_path)(X), model(X))


@every_method
def test_peft_finds_every_tensor_that_we_save(method: str, tmp_path: Path) -> None:
    save_adapter(adapted(method), tmp_path)
    model = peft.PeftModel.from_pretrained(toy(), tmp_path)
    model.save_pretrained(tmp_path / "again")
    close(load_adapter(toy(), tmp_path / "again")(X), model(X))


@pytest.mark.parametrize("targets", [r".*\.attn\.w[qv]", "all-linear", ["head", "wq"]])
def test_targets_mean_what_they_mean_to_peft(targets: Any, tmp_path: Path) -> None:
    model = by_peft(tmp_path, target_modules=targets, r=3)
    close(load_adapter(toy(), tmp_path)(X), model(X))


@every_method
def test_dropout_and_gradients_are_those_of_peft(method: str, tmp_path: Path) -> None:
    theirs = by_peft(tmp_path, lora_dropout=0.5, use_dora=method == "dora").train()
    ours = load_adapter(toy(), tmp_path, train=True).train()
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        output = model(X)
        output.square().sum().backward()
        trained = [p.grad for n, p in model.named_parameters() if p.grad is not None]
        gradients.append(sorted(gradient.norm().item() for gradient in trained))
    assert gradients[1] == pytest.approx(gradients[0], abs=1e-9)


@every_method
def test_training_follows_peft(method: str, tmp_path: Path) -> None:
    theirs = by_peft(tmp_path, use_dora=method == "dora").train()
    ours = load_adapter(toy(), tmp_path, train=True).train()
    fit(theirs)
    fit(ours)
    torch.testing.assert_close(ours(X), theirs(X), rtol=0, atol=1e-12)


def test_an_option_of_peft_that_we_lack_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, rank_pattern={"wq": 2})
    with pytest.raises(ValueError, match="option rank_pattern={'wq': 2} is not supported by LoRA"):
        load_adapter(toy(), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(written) > 30
