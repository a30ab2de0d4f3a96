"""Finished runs side by side, and tables of text."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.shared import Run
from vitft.report.comparison import text_table


def test_compare_shows_runs_side_by_side(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    for method in ("linear", "lora"):
        vitft("finetune", f"--adapter={method}", "--base", base, "--data", folder, "--epochs=1",
              "--out", tmp_path / method)  # fmt: skip
    runs = [base.parent, tmp_path / "linear", tmp_path / "lora"]
    page = tmp_path / "pages" / "compare.html"
    done = vitft("compare", *runs, "--out", page)
    rows = json.loads(vitft("compare", *runs, "--out", page, "--json").stdout)
    assert {row["method"] for row in rows} == {"pretrain", "linear", "lora"}
    accuracies = [row["test_accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    lora = next(row for row in rows if row["method"] == "lora")
    assert f"{lora['trained_share']:.2%}" in done.stdout
    assert f"{lora['file_kB']:,.0f}" in done.stdout
    assert page.read_text().count("--low:") == 3  # a bar a run
    below = json.loads(vitft("compare", tmp_path, "--out", page, "--json").stdout)
    assert [row["run"] for row in below] == [
        row["run"] for row in rows if row["run"] != str(base.parent)
    ]
    assert {row["lr"] for row in below} == {0.03, 0.003}  # by which they differ
    assert "rank" not in below[0]  # which only one of them has
    (tmp_path / "lora" / "summary.json").write_text("{}")
    assert "is broken" in vitft("compare", *runs, "--out", page, code=2).stderr
    (tmp_path / "lora" / "summary.json").unlink()
    assert "holds no finished run" in vitft("compare", *runs, "--out", page, code=2).stderr


def test_a_run_that_is_named_twice_is_shown_once(
    vitft: Run, run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ["--out", tmp_path / "compare.html", "--json"]
    monkeypatch.chdir(run.parent)
    names = [run.name, run, f"./{run.name}", f"{run}/", base.parent, f"{run}/."]
    rows = json.loads(vitft("compare", *names, *page).stdout)
    assert {row["run"] for row in rows} == {run.name, str(base.parent)}
    assert len(rows) == 2


def test_a_run_that_was_stopped_is_shown_as_such(vitft: Run, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "whole")
    shutil.copytree(run, tmp_path / "part")
    flags = [tmp_path, "--out", tmp_path / "compare.html"]
    assert not vitft("compare", *flags).stdout.splitlines()[0].endswith("stopped")
    facts = json.loads((tmp_path / "part" / "summary.json").read_text())
    facts |= {"stopped": "after 1 of 3 epochs", "test_accuracy": None}
    (tmp_path / "part" / "summary.json").write_text(json.dumps(facts))
    _, whole, part, *_ = vitft("compare", *flags).stdout.splitlines()
    assert "after 1 of 3 epochs" in part
    assert "after" not in whole
    assert "after 1 of 3 epochs" in (tmp_path / "compare.html").read_text()


def test_a_table_of_text_is_aligned() -> None:
    rows = [{"run": "a", "share": 0.5}, {"run": "long", "share": None}]
    expected = "run    share\na     50.00%\nlong       –"
    assert text_table(rows, {"run": "", "share": ".2%"}) == expected


def test_runs_on_different_images_are_not_ranked_together(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for name, data in (("one", folder), ("two", other)):
        vitft("finetune", "--adapter=linear", "--base", base, "--data", data, "--epochs=1",
              "--out", tmp_path / name)  # fmt: skip
    page = tmp_path / "compare.html"
    done = vitft("compare", tmp_path / "one", base.parent, tmp_path / "two", "--out", page)
    assert done.stdout.count("test accuracy") == 2
    text = page.read_text()
    assert re.findall(r"<h2>([^<]*)</h2>", text) == sorted([folder.name, "other"])
    assert text.count("Accuracy on the 12 test images") == 2
    assert text.count("<tr class=best>") == 2
    assert text.count("--low: 75.8%") == 3  # of 12 of 12 images, Wilson's
