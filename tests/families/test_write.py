"""What is written for other libraries gives our logits there, and comes back as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters
from tests.conftest import Run
from tests.families.sources import hf_model, timm_model
from vitft import load_model
from vitft.families.write import their_tensors


@pytest.mark.parametrize(
    "name", ["vit of classes", "dinov2", "dinov2 giant", "dinov3", "clip", "siglip"]
)
def test_the_way_back_to_transformers_is_exact(name: str, vitft: Run, tmp_path: Path) -> None:
    hf_model(name, tmp_path / "source")
    vitft("convert", tmp_path / "source", "--out", tmp_path / "base.safetensors")
    flags = ["--base", tmp_path / "base.safetensors", "--format=hf", "--out", tmp_path / "back"]
    assert "largest difference" in vitft("export", *flags).stdout
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "back"))
    needed = {k for k in before if "mask_token" not in k and "pooler" not in k}
    assert needed <= after.keys()
    assert all(torch.equal(before[key], after[key]) for key in needed)


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip"])
def test_the_way_back_to_timm_is_exact(name: str, vitft: Run, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    timm_model(name, tmp_path / "source")
    flags = ["--base", tmp_path / "source", "--format=timm", "--out", tmp_path / "back"]
    vitft("export", *flags)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_16_bits_come_back_in_16_bits(tmp_path: Path) -> None:
    model = hf_model("dinov2", tmp_path).bfloat16()
    model.save_pretrained(tmp_path)
    before, after = load_file(tmp_path / "model.safetensors"), their_tensors(load_model(tmp_path))
    assert all(torch.equal(before[key], after[key]) for key in before if "mask" not in key)


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_a_tuned_model_is_exported_with_its_head(kind: str, vitft: Run, tmp_path: Path) -> None:
    hf_model("dinov2", tmp_path / "source")
    model = load_model(tmp_path / "source")
    model.new_head(("a", "b", "c"))
    adapters.inject(model, adapters.LoRAConfig(rank=2), trainable=("head",))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    adapters.save_adapter(model, tmp_path / "adapter")
    flags = ["--base", tmp_path / "source", "--adapter", tmp_path / "adapter"]
    done = vitft("export", *flags, f"--format={kind}", "--out", tmp_path / f"out.{kind}")
    assert float(done.stdout.split()[-1]) < 1e-4
    if kind == "hf":
        config = json.loads((tmp_path / "out.hf" / "config.json").read_text())
        assert config["architectures"] == ["Dinov2ForImageClassification"]
        assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_what_cannot_be_exported_says_so(vitft: Run, tmp_path: Path) -> None:
    flags = ["--base=cifar10", "--out", tmp_path / "x"]
    done = vitft("export", *flags, "--format=hf", code=2)
    assert "was not converted from a folder of hf; export it as onnx" in done.stderr
    assert "unknown format 'tf'" in vitft("export", *flags, "--format=tf", code=2).stderr
