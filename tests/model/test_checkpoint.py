from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapters
from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.model.checkpoint import find_base


@pytest.fixture
def saved(tmp_path: Path) -> tuple[VisionTransformer, Path]:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2)).eval()
    model.classes, model.mean, model.std = ("cat", "dög"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_model(model, tmp_path / "base.safetensors")
    return model, tmp_path / "base.safetensors"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_reloaded_base_gives_equal_logits(saved: tuple[VisionTransformer, Path]) -> None:
    model, path = saved
    images = torch.randn(4, 3, 8, 8)
    loaded = load_model(path)
    assert torch.equal(loaded(images), model(images))
    assert (loaded.config, loaded.classes, loaded.mean, loaded.std) == (
        model.config, model.classes, model.mean, model.std,
    )  # fmt: skip
    assert not loaded.training


def test_the_same_model_gives_the_same_bytes(saved: tuple[VisionTransformer, Path]) -> None:
    model, path = saved
    again = path.with_name("again.safetensors")
    save_model(model, again)
    assert again.read_bytes() == path.read_bytes()
    assert [file.name for file in sorted(path.parent.iterdir())] == [
        "again.safetensors",
        "base.safetensors",
    ]


def test_a_base_in_bf16_loads_in_float32(saved: tuple[VisionTransformer, Path]) -> None:
    model, path = saved
    save_model(model.bfloat16(), path)
    loaded = load_model(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.head.weight, model.head.weight.float())


def test_a_new_head_is_saved_with_its_classes(saved: tuple[VisionTransformer, Path]) -> None:
    model, path = saved
    model.new_head(("a", "b", "c"))
    save_model(model, path)
    assert load_model(path).config.n_classes == 3
    model.classes = ("a",)
    with pytest.raises(ValueError, match="1 class names do not fit 3 logits"):
        save_model(model, path)


def test_an_adapted_model_is_no_base(saved: tuple[VisionTransformer, Path]) -> None:
    model, path = saved
    with pytest.raises(ValueError, match=r"holds blocks.0.attn.wk.lora_a; adapters.merge"):
        save_model(adapters.inject(model, adapters.LoRAConfig(rank=2)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), "lacks tensor norm.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "has an unexpected tensor extra"),
        (
            lambda t: t.update({"norm.bias": torch.zeros(3)}),
            r"tensor norm.bias has shape \(3,\), not \(16,\)",
        ),
    ],
)
def test_loading_is_strict(
    saved: tuple[VisionTransformer, Path], change: object, message: str
) -> None:
    path = saved[1]
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata(path))
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_a_file_cut_in_half_is_refused(saved: tuple[VisionTransformer, Path]) -> None:
    path = saved[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="base.safetensors is no whole safetensors file"):
        load_model(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_text("a text")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_model(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="its tensors are of no family that is known"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="there is no base nowhere: neither a file, nor a"):
        load_model("nowhere")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match="holds an adapter, no base; vitft merge makes one"):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    saved: tuple[VisionTransformer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="cannot write .*base.safetensors: No space left"):
        save_model(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_bundled_base_loads_by_name_and_has_a_card() -> None:
    model = load_model("cifar10")
    assert model.config.image_size == 32
    assert model.classes[0] == "airplane"
    assert len(model.classes) == 10
    assert "accuracy" in find_base("cifar10").with_suffix(".md").read_text()
