"""What is written for other libraries gives our logits there, and comes back as it was."""

import copy
import json
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import adapters
import recipes.export
from tests.families.sources import HF, TIMM, hf_model, timm_model
from tests.shared import Run, long, slow
from vitft import VisionTransformer, load_model, save_model
from vitft.families.check import load
from vitft.families.onnx import write_onnx
from vitft.families.write import their_tensors, write_source


@pytest.mark.parametrize("name", HF)
def test_the_way_back_to_transformers_is_exact(name: str, vitft: Run, tmp_path: Path) -> None:
    hf_model(name, tmp_path / "source")
    vitft("convert", tmp_path / "source", "--out", tmp_path / "base.safetensors")
    flags = ["--base", tmp_path / "base.safetensors", "--format=hf", "--out", tmp_path / "back"]
    assert "largest difference" in vitft("export", *flags).stdout
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "back"))
    lost = (
        "mask_token",
        "pooler",
        "decoder",
        "classifier.bias" if name == "deit of classes" else "-",
    )
    needed = {k for k in before if not any(part in k for part in lost)}
    assert needed <= after.keys()
    assert all(torch.equal(before[key], after[key]) for key in needed)


@pytest.mark.parametrize("name", TIMM)
def test_the_way_back_to_timm_is_exact(name: str, vitft: Run, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    timm_model(name, tmp_path / "source")
    flags = ["--base", tmp_path / "source", "--format=timm", "--out", tmp_path / "back"]
    vitft("export", *flags)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "back"))
    assert before.keys() == after.keys()
    lost = ("head.bias", "head_dist.bias") if name == "deit distilled" else ()
    assert all(torch.equal(before[key], after[key]) for key in before if key not in lost)


def test_16_bits_come_back_in_16_bits(tmp_path: Path) -> None:
    model = hf_model("dinov2", tmp_path).bfloat16()
    model.save_pretrained(tmp_path)
    before, after = load_file(tmp_path / "model.safetensors"), their_tensors(load_model(tmp_path))
    assert all(torch.equal(before[key], after[key]) for key in before if "mask" not in key)


@pytest.mark.parametrize("kind", ["hf", pytest.param("onnx", marks=long)])
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


@torch.no_grad()
def test_16_bits_are_kept_only_where_they_are_exact(vitft: Run, tmp_path: Path) -> None:
    model = hf_model("dinov2", tmp_path / "source").bfloat16()
    model.save_pretrained(tmp_path / "source")
    flags = ["--image-size", 48, "--out", tmp_path / "base.safetensors"]
    vitft("convert", tmp_path / "source", *flags)
    flags = ["--base", tmp_path / "base.safetensors", "--format=hf", "--out", tmp_path / "back"]
    assert float(vitft("export", *flags).stdout.split()[-1]) < 1e-5
    kinds = {k: t.dtype for k, t in load_file(tmp_path / "back" / "model.safetensors").items()}
    wide = [key for key, kind in kinds.items() if kind == torch.float32]
    assert wide == ["embeddings.position_embeddings"]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["hf", pytest.param("onnx", marks=slow)])
def test_what_does_not_agree_leaves_nothing_behind(
    kind: str, vitft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model("dinov2", tmp_path / "source")
    plain = recipes.export.write_and_check

    def broken(model: VisionTransformer, out: Path, kind: str, images: torch.Tensor) -> float:
        other = copy.deepcopy(model)
        other.blocks[0].ffn.w1.weight.mul_(1.5)
        write = write_onnx if kind == "onnx" else partial(write_source, library=kind)
        monkeypatch.setattr(recipes.export, "write_onnx", lambda _, path: write(other, path))
        monkeypatch.setattr(recipes.export, "write_source", lambda _, path, __: write(other, path))
        return plain(model, out, kind, images)

    monkeypatch.setattr(recipes.export, "write_and_check", broken)
    flags = ["--base", tmp_path / "source", f"--format={kind}", "--out", tmp_path / "out"]
    assert "outputs differ by" in vitft("export", *flags, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_timm_prepares_images_for_an_export_as_we_do(tmp_path: Path) -> None:
    import timm

    timm_model("vit", tmp_path)
    model = load_model(tmp_path)
    model.new_head(("a", "b"))
    model.head.weight.data.normal_()
    model.mean = (0.1, 0.2, 0.3)
    write_source(model, tmp_path / "back", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    found = timm.data.resolve_model_data_config(theirs)
    assert found["input_size"] == [3, 32, 32]
    assert (found["mean"], found["std"]) == ([0.1, 0.2, 0.3], [0.5] * 3)
    assert (found["crop_pct"], found["interpolation"]) == (0.875, "bicubic")
    assert theirs.num_classes == theirs.pretrained_cfg["num_classes"] == 2
    assert theirs.pretrained_cfg["label_names"] == ["a", "b"]


def test_an_export_that_its_library_does_not_load_is_refused(tmp_path: Path) -> None:
    hf_model("dinov2", tmp_path / "source")
    timm_model("vit", tmp_path)
    for library, source in (("hf", tmp_path / "source"), ("timm", tmp_path)):
        folder, model = tmp_path / library, load_model(source)
        write_source(model, folder, library)
        load(folder, library, model)
        tensors = load_file(folder / "model.safetensors")
        needed = next(key for key in tensors if "0" in key and key.endswith("norm1.weight"))
        save_file({k: t for k, t in tensors.items() if k != needed}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"transformers misses|timm does not load"):
            load(folder, library, model)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="transformers does not load what was written"):
        load(tmp_path / "hf", "hf", model)


ONNX = [
    *(("hf", name, 32) for name in ("siglip", "clip", "vit of classes")),
    ("hf", "dinov3 gated", 48),
    ("timm", "dinov2 giant", 48),
]


@slow
@pytest.mark.parametrize(("library", "name", "size"), ONNX)
@torch.no_grad()
def test_onnx_gives_logits_or_the_features_of_a_base_without_a_head(
    library: str, name: str, size: int, vitft: Run, tmp_path: Path
) -> None:
    source, base, out = tmp_path / "source", tmp_path / "base.safetensors", tmp_path / "out.onnx"
    source.mkdir()
    {"hf": hf_model, "timm": timm_model}[library](name, source)
    vitft("convert", source, "--image-size", size, "--out", base)
    vitft("export", "--base", base, "--format=onnx", "--out", out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model, x = load_model(base), torch.randn(5, 3, size, size)
    (found,) = session.run(None, {"images": x.numpy()})
    has_head = name == "vit of classes"
    assert model.has_head == has_head
    assert session.get_outputs()[0].name == ("logits" if has_head else "features")
    expected = model(x) if has_head else model.features(x)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_mae_tuned_for_classes_becomes_a_vit_of_transformers(vitft: Run, tmp_path: Path) -> None:
    hf_model("mae", tmp_path / "source")
    model = load_model(tmp_path / "source")
    model.new_head(("a", "b"))
    model.head.weight.normal_()
    save_model(model, tmp_path / "base.safetensors")
    flags = ["--base", tmp_path / "base.safetensors", "--format=hf", "--out", tmp_path / "back"]
    assert float(vitft("export", *flags).stdout.split()[-1]) < 1e-4
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]


def test_the_processor_of_an_export_prepares_images_as_we_do(vitft: Run, tmp_path: Path) -> None:
    import transformers

    hf_model("dinov2", tmp_path / "source")
    flags = ["--base", tmp_path / "source", "--format=hf", "--out", tmp_path / "back"]
    vitft("export", *flags)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
    found = processor(Image.fromarray(pixels.numpy()), return_tensors="pt")["pixel_values"]
    expected = load_model(tmp_path / "source").normalize(pixels.permute(2, 0, 1)[None].float())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
