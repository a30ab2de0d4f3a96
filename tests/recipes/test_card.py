"""The model card that stands beside what a run has trained."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import adapters
from recipes.sharing.card import CARD, MARK, card, write_card
from tests.shared import Run
from vitft.model.checkpoint import BUNDLED
from vitft.model.vit import VisionTransformer


@pytest.fixture(scope="module")
def run(vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fine-tuned adapter."""
    out = tmp_path_factory.mktemp("card") / "run"
    flags = ["--adapter=dora", "--epochs=1", "--batch-size=8", "--flip"]
    vitft("finetune", "--base", base, "--data", folder, "--out", out, *flags)
    return out


def changed(run: Path, out: Path, **summary: Any) -> Path:
    """Return a copy of a run with another summary."""
    shutil.copytree(run, out)
    told = json.loads((out / "summary.json").read_text()) | summary
    (out / "summary.json").write_text(json.dumps(told))
    return out


def test_the_hub_reads_the_card_of_an_adapter(run: Path, folder: Path) -> None:
    data = ModelCard.load(run / CARD).data
    assert (data.library_name, data.pipeline_tag) == ("vitft", "image-classification")
    assert {"dora", "peft"} <= set(data.tags)
    assert (data.license, data.base_model, data.datasets) == ("unknown", None, ["imagefolder"])
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    summary = json.loads((run / "summary.json").read_text())
    assert figures["accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-4)
    assert {result.dataset_name for result in data.eval_results} == {folder.name}
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_the_card_tells_what_was_trained_on_what(run: Path, base: Path, folder: Path) -> None:
    text = (run / CARD).read_text()
    assert "tells 3 classes apart: blue, green, red." in text
    assert f"{folder.name}: 54 training, 6 validation, 12 test images" in text
    assert re.search(r"test accuracy \*\*[\d.]+%\*\* of 12 images \(95 % interval: ", text)
    assert "dora on wq, wk, wv, wo, w1, w2, and the head: " in text
    assert "epochs 1, batch size 8, " in text
    assert ", flip, " in text
    assert "shift" not in text
    for private in (run.parent, base.parent.parent, folder.parent):
        assert str(private) not in text
    assert "the base's file, which is not on the hub" in text


def test_its_lines_run(
    run: Path, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / run.name)
    shutil.copy(base, tmp_path / base.parent.name)  # by which the card knows the base
    shutil.copy(folder / "test" / "red" / "000.png", "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", Path(run.name, CARD).read_text(), re.DOTALL)
    assert 'Classifier("base", "run")' in code
    exec(code, {})


def test_a_base_has_a_card_too(base: Path) -> None:
    text, loaded = (base.parent / CARD).read_text(), ModelCard.load(base.parent / CARD)
    assert loaded.data.base_model is None
    assert "A Vision Transformer, made with vitft." in text
    assert 'Classifier("base")' in text


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.md")), ids=lambda path: path.stem)
def test_the_card_of_a_base_that_ships_has_a_head(path: Path) -> None:
    data = ModelCard.load(path).data
    assert (data.license, data.library_name) == ("mit", "vitft")
    result = next(r for r in data.eval_results if r.metric_type == "accuracy")
    assert f"{result.metric_value:.2%}" in path.read_text()


def test_a_base_of_the_hub_is_named_with_its_licence(run: Path, tmp_path: Path) -> None:
    facts = {"base": "/home/me/b.safetensors", "base_source": "timm:vit_x", "base_licence": "MIT"}
    out = changed(run, tmp_path / "run", **facts)
    data = ModelCard(card(out)).data.to_dict()
    assert (data["base_model"], data["license"]) == ("timm/vit_x", "mit")
    assert data["base_model_relation"] == "adapter"
    assert 'Classifier("timm:vit_x", "hf:me/x")' in card(out, "me/x")
    out = changed(run, tmp_path / "odd", base_licence="free for all")
    assert ModelCard(card(out)).data.license == "other"


def test_several_labels_are_told_by_their_mean_average_precision(run: Path, tmp_path: Path) -> None:
    out = changed(run, tmp_path / "run", test_mean_average_precision=0.5)
    (result,) = ModelCard(card(out)).data.eval_results
    assert (result.metric_type, result.metric_value) == ("mean_average_precision", 0.5)
    assert "interval" not in card(out)
    none = {"test_accuracy": None, "test_balanced_accuracy": None, "test_macro_f1": float("nan")}
    out = changed(run, tmp_path / "untested", **none)
    splits = {result.dataset_split for result in ModelCard(card(out)).data.eval_results}
    assert splits == {"validation"}


def test_odd_names_stay_names(tiny: VisionTransformer, tmp_path: Path) -> None:
    tiny.classes = ("a|b", "<i>*\x85\ud800", "`c`")
    adapters.inject(tiny, adapters.SSFConfig(), trainable=("head",))
    out = tmp_path / 'x": \u2028{#😀'
    adapters.save_adapter(tiny, out)
    text = card(out)
    assert yaml.safe_load(text.split("---")[1])["tags"][-1] == "ssf"  # no peft, no figures
    assert r"a\|b, \<i\>\*??, \`c\`" in text
    assert "\u2028" not in text
    assert 'Classifier("BASE", ' in text
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")


def test_a_card_of_ones_own_stays(
    vitft: Run, run: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    out = changed(run, tmp_path / "run")
    mine = (out / CARD).read_text().replace(MARK, "") + "\nmine\n"
    (out / CARD).write_text("old " + MARK)
    write_card(out)
    assert (out / CARD).read_text() == card(out)
    (out / CARD).write_text(mine)
    write_card(out)
    assert (out / CARD).read_text() == mine
    flags = ["--adapter=full", "--base", base, "--data", folder, "--out", out]
    vitft("finetune", *flags, "--epochs=1", "--limit=6", "--overwrite")
    assert (out / CARD).read_text() == mine
    assert "fine-tuned whole from `base`" in card(out)
    assert 'Classifier("run")' in card(out)


@pytest.mark.parametrize(
    "summary", [{"n_parameters": [1]}, {"versions": [1]}, {"n_parameters": "x"}]
)
def test_a_broken_summary_is_named(summary: dict[str, Any], run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary\.json is broken"):
        card(changed(run, tmp_path / "run", **summary))
