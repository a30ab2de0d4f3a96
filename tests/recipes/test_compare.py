"""Finished runs side by side, and tables of text."""

import json
from pathlib import Path

from tests.conftest import Run
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
    assert "<svg" in page.read_text()
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


def test_a_table_of_text_is_aligned() -> None:
    rows = [{"run": "a", "share": 0.5}, {"run": "long", "share": None}]
    expected = "run    share\na     50.00%\nlong       –"
    assert text_table(rows, {"run": "", "share": ".2%"}) == expected
