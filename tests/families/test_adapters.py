"""Folders that PEFT saved on another library's model, on the converted base."""

from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adapters
from tests.families.sources import hf_model, save, timm_model
from tests.shared import Run, some
from vitft import VisionTransformer, load_model

X = torch.randn(2, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def tuned(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Return the model adapted by PEFT's LoRA, saved to the folder; see `tuned_by`."""
    return tuned_by(peft.LoraConfig(r=2, **options), model, folder)


def tuned_by(config: Any, model: nn.Module, folder: Path) -> nn.Module:
    """Return the model adapted by PEFT, every trained number random, saved to the folder."""
    made = peft.get_peft_model(model, config).eval()
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


HEAD = {"modules_to_save": ["classifier"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "vit",
            peft.IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"], **HEAD),
        ),
        ("vit", peft.LNTuningConfig(target_modules=["layernorm_before"])),
        ("vit", peft.LoKrConfig(r=2, target_modules=["q_proj", "fc1"], **HEAD)),
        ("vit", peft.VeraConfig(r=4, target_modules=["q_proj", "fc1"], **HEAD)),
        ("vit", peft.LoraConfig(r=2, target_modules="all-linear")),
        ("timm", peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["qkv", "fc2"])),
        ("timm", peft.LoHaConfig(r=2, target_modules=["fc1", "fc2"])),
        ("timm", peft.LoraConfig(r=2, target_modules="all-linear")),
    ],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of norms
@torch.no_grad()
def test_a_folder_of_any_method_loads(name: str, config: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    is_timm = name == "timm"
    model = (timm_model if is_timm else hf_model)(
        "vit" if is_timm else "vit of classes", tmp_path / "base"
    )
    with torch.enable_grad():
        theirs = tuned_by(config, model, tmp_path / "a")
    ours = adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "a")
    expected = theirs(X) if is_timm else theirs(X).logits
    torch.testing.assert_close(ours(X), expected, rtol=0, atol=1e-4)


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    model = hf_model("vit", tmp_path / "base")
    tuned(model, tmp_path / "a", target_modules=["q_proj", "pooler.dense"])
    with pytest.raises(ValueError, match=r"pooler\.dense\.lora_A\.weight has no counterpart"):
        adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "a")


def ours(
    source: Path, folder: Path, config: adapters.AdapterConfig, image_size: int = 32
) -> VisionTransformer:
    """Return a converted base with a random adapter and head, the adapter saved to the folder."""
    model = load_model(source)
    model.resize(image_size)
    model.new_head(("a", "b", "c"))
    adapters.inject(model, config, trainable=("head",))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    adapters.save_adapter(model, folder)
    return model


SOURCES = ["vit of classes", "dinov2", "dinov2 registers", "dinov2 giant", "ijepa", "timm"]
CONFIGS = [
    adapters.LoRAConfig(rank=2, alpha=7),
    adapters.LoRAConfig(rank=3, use_rslora=True, rank_pattern={"wv": 1, "blocks.1.*": 2}),
    adapters.LoRAConfig(rank=2, targets=("wq", "wv", "w2"), init="pissa"),
    adapters.DoRAConfig(rank=2, targets=("wq", "wv", "w1")),
    adapters.VeRAConfig(rank=4),
]


@pytest.mark.parametrize(("name", "config"), some([*product(SOURCES, CONFIGS)], 4))
def test_our_adapter_goes_to_peft_on_the_sources_model(
    name: str, config: adapters.AdapterConfig, vitft: Run, tmp_path: Path
) -> None:
    library = "timm" if name == "timm" else "hf"
    (tmp_path / "base").mkdir()
    timm_model("vit", tmp_path / "base") if name == "timm" else hf_model(name, tmp_path / "base")
    model = ours(tmp_path / "base", tmp_path / "a", config)
    flags = ["--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "out"]
    done = vitft("export", *flags, f"--format=peft-{library}")
    assert float(done.stdout.split()[-1]) < 1e-4
    again = adapters.load_adapter(load_model(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=1e-4)


@pytest.mark.parametrize("library", ["hf", "timm"])
def test_an_adapter_of_another_image_size_goes_to_peft(
    library: str, vitft: Run, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    hf_model("vit", base) if library == "hf" else timm_model("vit", base)
    model = ours(base, tmp_path / "a", adapters.LoRAConfig(rank=2), image_size=48)
    flags = ["--base", base, "--adapter", tmp_path / "a", "--out", out]
    done = vitft("export", *flags, f"--format=peft-{library}")
    assert float(done.stdout.split()[-1]) < 1e-4
    images = torch.randn(2, 3, 48, 48)
    source = load_model(base)
    source.resize(48)
    again = adapters.load_adapter(source, out)
    again.resize(48)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", adapters.SSFConfig(targets=("w1",)), "is a SSFLinear, which PEFT has not"),
        ("dinov3", adapters.LoRAConfig(), "no class for images' classes on 'dinov3_vit'"),
        ("vit", None, "writes an adapter; name one by --adapter"),
    ],
)
def test_what_peft_has_no_form_for_is_named(
    name: str, config: adapters.AdapterConfig | None, message: str, vitft: Run, tmp_path: Path
) -> None:
    hf_model(name, tmp_path / "base")
    flags = ["--base", tmp_path / "base", "--format=peft-hf", "--out", tmp_path / "out"]
    if config:
        ours(tmp_path / "base", tmp_path / "a", config)
        flags += ["--adapter", tmp_path / "a"]
    assert message in vitft("export", *flags, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_linear_of_timm_that_is_only_read_is_named(vitft: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    timm_model("dinov3 biases", base)
    flags = ["--base", base, "--format=peft-timm", "--adapter", tmp_path / "a"]
    ours(base, tmp_path / "a", adapters.LoRAConfig(rank=2))
    told = vitft("export", *flags, "--out", tmp_path / "out", code=2).stderr
    assert "timm's model reads the weight of 'blocks.0.attn.qkv' without calling it" in told
    assert not (tmp_path / "out").exists()
    ours(base, tmp_path / "a", adapters.LoRAConfig(rank=2, targets=("wo", "w1")))
    vitft("export", *flags, "--out", tmp_path / "out")


def test_an_adapter_of_our_own_base_needs_no_other_model(
    vitft: Run, base: Path, run: Path, tmp_path: Path
) -> None:
    flags = ["--base", base, "--adapter", run, "--format=peft-hf", "--out", tmp_path / "out"]
    told = vitft("export", *flags, code=2).stderr
    assert "PEFT loads the adapter's folder as it is" in told
    assert not (tmp_path / "out").exists()
