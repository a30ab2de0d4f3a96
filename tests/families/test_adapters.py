"""Folders that PEFT saved on another library's model, on the converted base."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adapters
from tests.families.sources import hf_model, save, timm_model
from vitft import load_model

X = torch.randn(2, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def tuned(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Return the model adapted by PEFT, every trained number random, saved to the folder."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["vit of classes", "dinov2 of classes"])
@torch.no_grad()
def test_a_folder_of_transformers_loads(name: str, dora: bool, tmp_path: Path) -> None:
    model = hf_model(name, tmp_path / "base")
    options = {"target_modules": ["q_proj", "v_proj", "fc1"], "use_dora": dora}
    with torch.enable_grad():
        theirs = tuned(model, tmp_path / "a", modules_to_save=["classifier"], **options)
    ours = adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "a")
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)
    adapters.save_adapter(ours, tmp_path / "again")
    again = adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "again")
    assert torch.equal(again(X), ours(X))


@torch.no_grad()
def test_a_folder_with_the_names_of_transformers_4_loads(tmp_path: Path) -> None:
    model = hf_model("vit of classes", tmp_path / "base")
    with torch.enable_grad():
        theirs = tuned(
            model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["classifier"]
        )
    file = tmp_path / "a" / "adapter_model.safetensors"
    renames = {"vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query"}
    tensors = load_file(file)
    for new, old in renames.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    assert any("encoder.layer.0.attention.attention.query" in key for key in tensors)
    save(tensors, file)
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "a" / "adapter_config.json").write_text(config.replace("q_proj", "query"))
    ours = adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "a")
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_folder_of_timm_with_fused_projections_loads(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = timm_model("vit", tmp_path / "base")
    with torch.enable_grad():
        theirs = tuned(
            model,
            tmp_path / "a",
            target_modules=["qkv", "attn.proj", "fc2"],
            modules_to_save=["head"],
        )
    ours = load_model(tmp_path / "base")
    adapters.load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(ours(X), theirs(X), rtol=0, atol=1e-4)


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    model = hf_model("vit", tmp_path / "base")
    tuned(model, tmp_path / "a", target_modules=["q_proj", "pooler.dense"])
    with pytest.raises(ValueError, match=r"pooler\.dense\.lora_A\.weight has no counterpart"):
        adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "a")
