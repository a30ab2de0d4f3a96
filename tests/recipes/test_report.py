"""`vitft report` makes of what a run kept the page that the run left."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.shared import TINY_FLAGS, Run, drawn, long

pytestmark = long

# a picture that is no base64 and no UTF-8
LONE = """{"split": "test", "n": 1, "classes": [], "looks": [
    {"name": "a", "says": "a", "picture": "\\ud800"}]}"""


@pytest.fixture(scope="module")
def runs(vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run of each kind."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--data", folder, "--epochs=1", "--out"]
    with drawn():
        vitft("pretrain", *TINY_FLAGS, *common, out / "base")
        vitft("finetune", "--adapter=lora", "--base", base, *common, out / "lora")
        vitft("sweep", "--adapter=lora", "--rank=1,2", "--base", base, *common, out / "sweep")
    return out


@pytest.fixture
def lora(runs: Path, tmp_path: Path) -> Path:
    """Return a run that may be changed."""
    return Path(shutil.copytree(runs / "lora", tmp_path / "lora"))


@pytest.mark.usefixtures("draws")
def test_pages_are_made_again_to_the_byte(vitft: Run, runs: Path) -> None:
    pages = [runs / name / "report.html" for name in ("base", "lora", "sweep")]
    before = [page.read_bytes() for page in pages]
    for page in pages:
        page.unlink()
    done = vitft("report", *(page.parent for page in pages))
    assert done.stdout.split() == [word for page in pages for word in ("report", str(page))]
    assert done.stderr == ""
    assert [page.read_bytes() for page in pages] == before


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("report.json", "there is no report.json, so all that shows images is missing"),
        ("summary.json", "there is no summary.json: the run is not done"),
    ],
)
def test_what_an_old_run_lacks_is_told_in_a_line(
    vitft: Run, lora: Path, gone: str, told: str
) -> None:
    (lora / gone).unlink()
    done = vitft("report", lora)
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Training" in (lora / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "there is no run in .*: it has no config.json"),
        ("summary.json", "[1]", "is broken: summary.json"),
        ("report.json", "{}", "missing required field split; remove that file or run again"),
        ("report.json", '{"split": "test"}', "report.json: .*missing"),
        ("report.json", LONE, "report.json: .*surrogates not allowed"),
        ("metrics.jsonl", '{"train_loss": 1}\n', "a line has no epoch"),
    ],
)
def test_what_is_broken_is_told_in_a_line(
    vitft: Run, lora: Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (lora / file).unlink()
    else:
        (lora / file).write_text(content)
    error = vitft("report", lora, code=2).stderr
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_figure_that_is_no_number_is_no_reason_to_fail(vitft: Run, lora: Path) -> None:
    summary = json.loads((lora / "summary.json").read_text()) | {"test_loss": float("nan")}
    (lora / "summary.json").write_text(json.dumps(summary))
    vitft("report", lora)
    assert "<dt>test loss</dt><dd>–</dd>" in (lora / "report.html").read_text()


def test_the_report_tells_of_the_options_that_a_run_went_on_with(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--out", tmp_path]
    vitft("finetune", *flags, "--epochs=1")
    vitft("finetune", *flags, "--epochs=2", "--resume")
    assert "\nepochs 2\n" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 2


def test_a_sweep_marks_its_best(runs: Path) -> None:
    text = (runs / "sweep" / "report.html").read_text()
    best = json.loads((runs / "sweep" / "sweep.json").read_text())["best"]
    assert text.partition("<tr class=best>")[2].startswith(
        f"<td class=number>{best['rank']:g}</td>"
    )
    assert f"The best by validation: rank {best['rank']}." in text
    assert f"{best['n_validation']} validation images" in text


@pytest.mark.parametrize("row", ["x", [1], None, {"folders": [], "val_accuracy": 10**400}])
def test_a_row_of_a_sweep_that_is_none_is_told_in_a_line(
    row: object, vitft: Run, runs: Path, tmp_path: Path
) -> None:
    found = json.loads((runs / "sweep" / "sweep.json").read_text())
    found["rows"].append(row)
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    error = vitft("report", tmp_path, code=2).stderr
    assert error.count("\n") == 1
    assert "sweep.json is broken" in error
