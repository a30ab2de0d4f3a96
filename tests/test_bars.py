"""Whoever waits sees how far it has come: a bar on a terminal, a line now and then in a log."""

import re
import sys
from io import StringIO

import pytest

from vitft import bars
from vitft.bars import LogLines, note, progress_bar


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_when_one_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(bars.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(sys, "stderr", shown := StringIO())
    with progress_bar(70, desc="features") as bar:
        assert isinstance(bar, LogLines)
        for i in range(14):
            bar.set_postfix_str(f"loss {i}", refresh=False)
            bar.n += 5
            bar.display()
            if i == 7:
                note("epoch 1")
    lines = shown.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "features: 25 of 70 images",
        "epoch 1",
        "features: 50 of 70 images",
    ]
    assert lines[0].endswith(", loss 4")


def test_a_log_of_a_short_job_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := StringIO())
    with progress_bar(10) as bar:
        for _ in range(10):
            bar.update()
    assert shown.getvalue() == ""


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_a_terminal_and_a_notebook_get_a_bar(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal() if where == "terminal" else StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with progress_bar(20_000, initial=5_000) as bar:
        bar.update(15_000)
    assert re.search(r"100%\|.*\| 20\.0k/20\.0k \[", shown.getvalue())
