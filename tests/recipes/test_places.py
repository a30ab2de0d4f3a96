"""What a command writes: nobody else writes it then, and a killed one's remains go."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from filelock import FileLock

from recipes.shared.places import check_writable, output
from tests.shared import Run, paint
from vitft.files import unfinished

WRITING = ["convert", "export", "embed"]


def command(name: str, base: Path, out: Path) -> list[object]:
    """Return a command that writes `out`."""
    paint(out.parent / "red.png", (200, 0, 0))
    return {
        "convert": ["convert", base, "--out", out],
        "export": ["export", "--base", base, "--format=onnx", "--out", out],
        "embed": ["embed", "--base", base, out.parent / "red.png", "--out", out],
    }[name]


@pytest.mark.parametrize("name", ["convert", "embed"])
def test_what_a_killed_command_left_goes_with_the_next(
    name: str, vitft: Run, base: Path, tmp_path: Path
) -> None:
    out, arguments = tmp_path / "out.npz", command(name, base, tmp_path / "out.npz")
    other = unfinished(tmp_path / "other.npz")
    for path in (unfinished(out), tmp_path / ".out.npz.lock", other):
        path.touch()
    vitft(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", "red.png", other.name}


def test_a_command_killed_when_all_was_done_leaves_nothing_to_the_next(
    vitft: Run, base: Path, tmp_path: Path
) -> None:
    arguments = command("convert", base, tmp_path / "out")
    vitft(*arguments)
    (tmp_path / ".out.lock").touch()
    assert "is there already" in vitft(*arguments, code=2).stderr
    assert not (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("name", WRITING)
def test_two_commands_never_write_one_file(
    name: str, vitft: Run, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with output(out):
        told = vitft(*command(name, base, out), code=2).stderr
    assert f"another run writes to {out} now; wait for its end or choose another --out" in told
    assert not out.exists()


@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_cannot_be_written_is_named(
    name: str, vitft: Run, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    arguments = [out if a == tmp_path / "out" else a for a in command(name, base, tmp_path / "out")]
    told = vitft(*arguments, code=2).stderr
    assert told.startswith(f"Error: cannot write {out}: ")
    assert told.endswith("; choose a folder you can write to\n")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_place_where_nothing_can_be_made_is_no_busy_one() -> None:
    with pytest.raises(OSError, match=r"cannot write /proc/out: No such file"), output("/proc/out"):
        pass


def test_a_run_that_is_stopped_as_it_tries_its_folder_leaves_nothing(
    vitft: Run, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def stopped(dir: Path) -> None:
        with TemporaryFile(dir=dir):
            seen.extend(dir.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.shared.places.TemporaryFile", stopped)
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--out", tmp_path]
    vitft("finetune", *flags, code=130)
    assert not [*tmp_path.iterdir(), *seen]


def test_a_stop_while_the_lock_goes_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def stopped(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            os.kill(os.getpid(), signal.SIGTERM)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "out"):
        pass
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    with output(tmp_path / "out"):  # it is free
        pass


@pytest.mark.parametrize("third", [True, False])
def test_a_lock_that_goes_with_its_run_is_no_lock_for_another(
    third: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire, lock = FileLock.acquire, tmp_path / ".out.lock"
    others = FileLock(lock)
    lock.touch()

    def late(held_by: FileLock, timeout: float) -> Any:
        """Hold the file of a run that ends and removes it; a third run may hold a new one."""
        found = acquire(held_by, timeout)
        if not (tmp_path / "gone").exists():
            lock.rename(tmp_path / "gone")
            if third:
                acquire(others, 0)
        return found

    monkeypatch.setattr(FileLock, "acquire", late)
    busy = pytest.raises(ValueError, match="another run writes to")
    with busy if third else nullcontext(), output(tmp_path / "out"):
        assert lock.exists()
    assert others.is_locked is third
    others.release()


@pytest.mark.parametrize("then", [Path.exists, Path.read_text])
def test_a_folder_that_is_removed_meanwhile_is_told(
    then: Callable[[Path], object], tmp_path: Path
) -> None:
    def work(out: Path) -> None:
        shutil.rmtree(out.parent)
        then(out)

    told = pytest.raises(ValueError, match="was removed meanwhile; what was written is lost")
    with told, output(tmp_path / "folder" / "out") as out:
        work(out)


def test_a_folder_whose_name_safetensors_cannot_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no UTF-8; choose another --out"):
        check_writable(tmp_path / os.fsdecode(b"\xff"))
    assert not [*tmp_path.iterdir()]
