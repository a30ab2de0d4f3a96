"""Several processes end where one does, whatever is trained, drawn at random or left over."""

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters
from tests.processes import in_processes
from tests.shared import slow
from tests.training.several import (
    CASES,
    SHARDED,
    alone,
    in_turn,
    new_run,
    result,
    results,
    train_sharded,
    train_shared,
)
from vitft import load_model
from vitft.devices import shares
from vitft.devices.shares import Rows
from vitft.training.loop import train
from vitft.training.saving import restore
from vitft.training.stop import Interrupted


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    """Check that a run ended where another did; losses are summed up in float32."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-6 if key == "figures" else 1e-8
        torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=f"{name}: {key}")


@pytest.mark.parametrize("names", [("pretrained",), pytest.param([*CASES], marks=slow)])
def test_four_processes_end_where_one_does(names: list[str], tmp_path: Path) -> None:
    folders = {name: tmp_path / str(i) for i, name in enumerate(names)}
    in_processes(4, tmp_path, in_turn, train_shared, [*folders.items()])
    for name, folder in folders.items():
        expected, found = alone(name, tmp_path / "alone"), results(folder)
        assert len(found) == 4
        for values in found:
            assert_same(values, expected, name)


@slow
def test_a_sharded_model_ends_where_a_whole_one_does_and_is_saved_whole(tmp_path: Path) -> None:
    folders = {name: tmp_path / str(i) for i, name in enumerate(SHARDED)}
    in_processes(2, tmp_path, in_turn, train_sharded, [*folders.items()])
    for name, folder in folders.items():
        start = result(new_run(name, tmp_path / "start"))
        expected, found = alone(name, tmp_path / "alone"), results(folder)
        assert len(found) == 2
        for values in found:
            assert_same(values, expected, name)
        if name.startswith("full"):
            saved = load_model(folder / "model.safetensors").state_dict()
        else:
            base = new_run("full", tmp_path / "base").model
            saved = adapters.load_adapter(base, folder).state_dict()
            trained = [key for key in load_file(folder / "adapter_model.safetensors")]
            assert trained
        changed = [
            key
            for key, value in start.items()
            if key in saved and not torch.equal(value, expected[key])
        ]
        assert changed
        for key in changed:
            torch.testing.assert_close(saved[key].double(), expected[key], atol=1e-6, rtol=0)
            assert not torch.equal(saved[key].double(), start[key]), f"{name}: {key}"


def go_on(name: str, folder: Path, n_steps: int) -> None:
    """Go on with a run, or start it; the last process asks to stop after some steps."""
    run = new_run(name, folder)
    if (folder / "state.safetensors").exists():
        restore(run)
    before = run.epoch * run.steps_per_epoch + run.step
    plain, last = run.update, not dist.is_initialized() or dist.get_rank() > 0

    def update() -> bool:
        skipped = plain()
        if run.epoch * run.steps_per_epoch + run.step + 1 == before + n_steps and last:
            signal.raise_signal(signal.SIGTERM)
        return skipped

    run.update = update  # type: ignore[method-assign]
    try:
        train(run)
    except Interrupted:
        assert run.epoch * run.steps_per_epoch + run.step == before + n_steps
    else:
        save_file(result(run), folder / f"result-{dist.get_rank()}.safetensors")


@slow
def test_runs_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    names = ("pretrained", "lora, streamed", "lora on features")
    folders = {name: tmp_path / str(i) for i, name in enumerate(names)}
    in_processes(2, tmp_path, in_turn, go_on, [(*pair, 3) for pair in folders.items()])
    for name, folder in folders.items():
        go_on(name, folder, 4)
    in_processes(3, tmp_path, in_turn, go_on, [(*pair, 99) for pair in folders.items()])
    for name, folder in folders.items():
        expected, found = alone(name, tmp_path / "alone"), results(folder)
        assert len(found) == 3
        for values in found:
            assert_same(values, expected, name)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("n_processes", [2, 3, 4])
def test_every_image_is_somewhere_once_beside_the_one_it_is_mixed_with(
    n: int, n_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "n_processes", lambda: n_processes)
    seen: list[int] = []
    for rank in range(n_processes):
        monkeypatch.setattr(shares, "rank", lambda rank=rank: rank)
        rows = Rows.of(n)
        assert rows.here is not None
        assert len(rows) >= rows.least >= 1
        assert torch.equal(rows.here.flip(0), n - 1 - rows.here) or not rows.count
        seen += rows.here.tolist() if rows.count else []
    assert sorted(seen) == [*range(n)]
