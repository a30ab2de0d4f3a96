"""Files of ours: a newer format is refused with what to install, an older one is read."""

import os
from pathlib import Path

import pytest
import torch

from vitft.files import (
    FORMAT,
    read_json,
    read_metadata,
    read_tensors,
    remove_unfinished,
    unfinished,
    write_bytes,
    write_tensors,
)
from vitft.version import __version__


def test_a_file_says_its_format_to_readers_and_not_to_what_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(2)}, {"classes": ["a"]})
    assert read_metadata(tmp_path / "a") == {"classes": ["a"]}
    header = (tmp_path / "a").read_bytes()[:400].decode(errors="replace")
    assert f'\\"format\\": {FORMAT}, \\"version\\": \\"{__version__}\\"' in header


@pytest.mark.parametrize("number", [FORMAT + 1, "two", None, 1.5])
def test_a_newer_format_is_refused_with_what_to_install(number: object, tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(2)}, {"format": number, "version": "7.1"})
    told = r"in format .*; this one knows up to 1: pip install 'vitft>=7\.1'$"
    with pytest.raises(ValueError, match=told):
        read_tensors(tmp_path / "a")


def test_a_file_without_a_format_is_of_the_first(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(2)}, {"format": 1})
    assert read_tensors(tmp_path / "a")[1] == {}


@pytest.mark.parametrize("text", ["[1]", "1", "x", "[" * 100_000])
def test_metadata_that_is_none_of_ours_is_refused(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "a", {"vitft": text})
    with pytest.raises(ValueError, match="was not written by vitft: its metadata is no"):
        read_metadata(tmp_path / "a")


def test_what_was_left_unfinished_of_a_file_goes_and_nothing_else(tmp_path: Path) -> None:
    out, others = tmp_path / "a.onnx", [tmp_path / name for name in ("a", "a.onnx.x", "b-a.onnx")]
    left = [unfinished(out), unfinished(unfinished(out)), unfinished(out)]
    kept = [out, tmp_path / ".a.onnx", *map(unfinished, others)]
    left[2].mkdir()
    for path in (*left[:2], left[2] / "config.json", *kept):
        path.touch()
    remove_unfinished(tmp_path, "a.onnx")
    assert {*tmp_path.iterdir()} == {*kept}
    remove_unfinished(tmp_path)
    assert {*tmp_path.iterdir()} == {*kept[:2]}


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*_: object, **__: object) -> None:
        raise RuntimeError("file is smaller than the required mapping")

    write_tensors(tmp_path / "a", {"x": torch.ones(2)}, {})
    monkeypatch.setattr("vitft.files.safe_open", replaced)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_tensors(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="cannot write .*: it is no file"):
        write_bytes(pipe, b"x")
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")
def test_what_may_have_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("folder", "device", "pipe"):
        with pytest.raises(ValueError, match="is no JSON .it is a folder, a pipe or a device"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        read_json(tmp_path / "none")
