"""What a set may take follows what is free, also in a container."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitft.devices import memory
from vitft.devices.memory import free_bytes, max_set_bytes, peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a container's limits, on a machine with 1000 bytes free."""
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    found = SimpleNamespace(available=1000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: found)
    return tmp_path


def test_a_set_takes_a_quarter_of_what_is_free(group: Path) -> None:
    assert free_bytes(CPU) == 1000
    assert max_set_bytes(CPU) == 250


def test_all_processes_take_what_the_poorest_can(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def highest(values: list[int]) -> list[int]:
        asked.append(values)
        return [-70]  # another process has 70 bytes for a set

    monkeypatch.setattr(memory, "highest", highest)
    monkeypatch.setattr(memory, "n_on_machine", lambda: 2)
    assert max_set_bytes(CPU) == 70
    assert asked == [[-125]]


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("700", "300", 400), ("max", "300", 1000), ("700", "900", 0), ("9000", "1", 1000)],
)
def test_a_container_may_have_less(group: Path, limit: str, used: str, free: int) -> None:
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.current").write_text(used + "\n")
    assert free_bytes(CPU) == free


def test_the_peak_is_what_was_once_taken() -> None:
    before = peak_bytes(CPU)
    assert before is not None
    large = torch.ones(before // 4 + 10_000_000)  # four bytes each: more than all so far
    del large
    after = peak_bytes(CPU)
    assert after is not None
    assert before + 30_000_000 < after < before * 2 + 200_000_000


def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 10_000))
    assert max_set_bytes(torch.device("cuda", 1)) == 200
