"""An adapter trained on a converted base, with other classes and another size, goes everywhere."""

import json
from pathlib import Path

import pytest

import adapters
from tests.families.sources import hf_model
from tests.shared import Run, slow
from vitft import load_model


@pytest.fixture(scope="module")
def trained(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Return the options that name a base of another library and an adapter for images of 16."""
    place = tmp_path_factory.mktemp("trained")
    hf_model("dinov2", place / "source")
    model = ["--base", place / "source", "--adapter", place / "run"]
    flags = ["--adapter=lora", "--image-size=16", "--crop=0.8", "--epochs=1", "--data", folder]
    vitft("finetune", *model[:2], *flags, "--out", place / "run")
    return model


@pytest.mark.parametrize("kind", ["hf", pytest.param("onnx", marks=slow), "peft-hf"])
def test_it_is_exported_with_its_head(
    kind: str, vitft: Run, trained: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = vitft("export", *trained, "--format", kind, "--out", out)
    assert float(done.stdout.split()[-1]) < 1e-4
    assert done.stderr == ""
    if kind == "hf":
        again = load_model(out)
        assert again.classes == ("blue", "green", "red")
        assert (again.image_size, again.framing.crop) == (16, 0.8)


def test_a_head_that_has_not_learned_is_not_exported(
    vitft: Run, trained: list[object], tmp_path: Path
) -> None:
    model = load_model(str(trained[1]))
    model.new_head(("a", "b", "c"))
    adapters.inject(model, adapters.LoRAConfig(), trainable=("head",))
    adapters.save_adapter(model, tmp_path / "new")
    flags = [*trained[:2], "--adapter", tmp_path / "new", "--out", tmp_path / "out"]
    told = vitft("export", *flags, "--format=peft-hf", code=2).stderr
    assert "the adapter's head holds zeros: it has not been trained" in told
    vitft("export", *flags, "--format=hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Dinov2Model"]
    assert config["id2label"] == {}
