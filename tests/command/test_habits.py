"""What people type: a pipe that closes, a broken picture, a folder with less, values in quotes."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.trouble import Command
from tests.shared import TINY_FLAGS, Run, command_line, long, paint, some
from vitft import Classifier, load_model
from vitft.command.options import comma_separated
from vitft.command.streams import SafeStream


@pytest.fixture(scope="module")
def base(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "base"
    vitft("pretrain", "--data", folder, "--out", out, "--epochs=2", "--batch-size=8", *TINY_FLAGS)
    return out


@pytest.mark.parametrize("command", some(["finetune", "pretrain"], 2))
def test_a_run_goes_on_when_nobody_reads_its_progress(
    folder: Path, base: Path, tmp_path: Path, command: str
) -> None:
    own = {"finetune": ["--adapter=linear", "--base", base], "pretrain": TINY_FLAGS}
    flags = ["--data", folder, "--out", tmp_path / "run", "--epochs=3", "--batch-size=8"]
    started = Command([command, *flags, *own[command]])
    assert "train on" in started.output.readline()
    started.output.close()
    started.process.join(60)
    assert started.process.exitcode == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_run_goes_on_when_its_terminal_is_lost(folder: Path, base: Path, tmp_path: Path) -> None:
    """Its writes then fail with another error than a pipe's, and the system sends SIGHUP."""
    ours, its = os.openpty()

    def before() -> None:
        os.close(ours)
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(its, number)

    out = tmp_path / "run"
    flags = ["--adapter=linear", "--base", base, "--data", folder, "--out", out, "--epochs=3"]
    started = Command(["finetune", *flags], before)
    os.close(its)
    assert os.read(ours, 1)
    os.close(ours)
    assert started.end(60).status == 0
    assert (out / "summary.json").is_file()


@long
def test_a_stream_that_was_closed_before_the_start_is_none(base: Path) -> None:
    command = [sys.executable, "-m", "vitft", "inspect", str(base)]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.startswith(b"kind ")
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command]).returncode == 0


def test_one_broken_image_costs_only_itself(vitft: Run, base: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        paint(tmp_path / f"{name}.png", (200, 20, 20))
    (tmp_path / "b.png").write_bytes(b"no image")
    done = vitft("predict", "--base", base, tmp_path, "--json", code=2)
    assert [Path(row["image"]).name for row in json.loads(done.stdout)] == ["a.png", "c.png"]
    assert "skipped: " in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: 1 of 3 images are missing or broken: ")
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").unlink()
    assert json.loads(vitft("predict", "--base", base, tmp_path, "--json", code=2).stdout) == []


def test_one_missing_image_costs_only_itself(vitft: Run, base: Path, tmp_path: Path) -> None:
    there, gone = tmp_path / "a.png", tmp_path / "gone.png"
    paint(there, (200, 20, 20))
    done = vitft("predict", "--base", base, gone, there, "--json", code=2)
    assert [row["image"] for row in json.loads(done.stdout)] == [str(there)]
    assert f"skipped: there is no image {gone}\n" in done.stderr
    assert done.stderr.endswith(
        f"1 of 2 images are missing or broken: {gone}; the others are answered\n"
    )
    told = vitft("predict", "--base", base, gone, code=2).stderr
    assert told == f"Error: there is no image {gone}\n"
    with pytest.raises(FileNotFoundError, match="gone.png"):
        Classifier(base).predict(gone)


def test_evaluate_needs_only_what_it_reads(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    """Classes fewer than the model's, and in another order, keep their own labels."""
    for name in ("red", "blue"):
        shutil.copytree(folder / "test" / name, tmp_path / "test" / name)
    flags = ["--base", base, "--data", tmp_path, "--precision=fp32", "--json"]
    figures = json.loads(vitft("evaluate", *flags).stdout)
    model, right, loss = load_model(base).requires_grad_(False), 0, 0.0
    for name in ("red", "blue"):
        for path in sorted((tmp_path / "test" / name).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
            logits = model(model.normalize(pixels))
            right += model.classes[int(logits.argmax())] == name
            loss -= float(logits.log_softmax(1)[0, model.classes.index(name)]) / 8
    assert figures["test_accuracy"] == right / 8
    assert figures["test_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("wq,wk", ("wq", "wk")),
        (" wq , ,wk,", ("wq", "wk")),
        (r"blocks\.\d{1,2}\..*,wq", (r"blocks\.\d{1,2}\..*", "wq")),
        (r"(a,b)[c,d],\(,x", ("(a,b)[c,d]", r"\(", "x")),
        ("'a,b',\"c,d\"", ("a,b", "c,d")),
        ("", ()),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_separate(value: str, parts: tuple[str, ...]) -> None:
    assert comma_separated(value) == parts


def test_an_empty_value_is_a_value(vitft: Run, folder: Path, base: Path, tmp_path: Path) -> None:
    common = ["--adapter=ia3", "--base", base, "--data", folder, "--epochs=1", "--out"]
    vitft("finetune", *common, tmp_path / "none", "--feedforward", "")
    vitft("finetune", *common, tmp_path / "default")
    written = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["feedforward_modules"]
        for name in ("none", "default")
    ]
    assert written == [[], ["w2"]]


@pytest.mark.parametrize("flag", ["--out", "--base", "--data", "--device", "--layers"])
def test_an_empty_text_is_no_value(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, flag: str
) -> None:
    given = {"--base": base, "--data": folder, "--out": tmp_path / "out"} | {flag: ""}
    words = [word for pair in given.items() for word in pair]
    answer = vitft("finetune", "--adapter=lora", *words, code=2)
    assert f"Error: {flag} is empty; " in answer.stderr
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("flag", ["--lr", "--rank", "--sizes", "--log"])
def test_an_empty_list_is_no_value(vitft: Run, base: Path, tmp_path: Path, flag: str) -> None:
    given = ["--adapter=lora", "--base", base, "--data=shapes", "--out", tmp_path / "out"]
    for empty in ("", " , "):
        told = vitft("sweep", *given, f"{flag}={empty}", code=2).stderr
        assert told == f"Error: {flag} is empty; give it a value or leave it out\n"


def test_an_empty_argument_is_no_value(vitft: Run, base: Path, tmp_path: Path) -> None:
    told = vitft("predict", "--base", base, "", code=2).stderr
    assert "Error: a part of IMAGE is empty; leave it out" in told
    assert "Error: SOURCE is empty; " in vitft("convert", "", "--out", tmp_path, code=2).stderr
    told = vitft("finetune", "--from", "", "--out", tmp_path, code=2).stderr
    assert "Error: --from is empty; " in told


def test_a_name_that_the_terminal_lacks_is_replaced(base: Path, tmp_path: Path) -> None:
    image, written = tmp_path / "käse\u2603.png", io.BytesIO()
    paint(image, (200, 0, 0))
    out = io.TextIOWrapper(written, encoding="latin-1")
    assert command_line(["predict", "--base", base, image], out, io.StringIO()) == 0
    out.flush()
    assert b"k\xe4se?.png  " in written.getvalue()


def test_no_control_character_reaches_the_terminal() -> None:
    out = io.StringIO()
    safe = SafeStream(out)
    for text in ("a\x1b[2Jb\x00c\x9bd\te\nf\rg", "\r 50%|bar|\r", "\r", ""):
        safe.write(text)
    assert out.getvalue() == "a\\x1b[2Jb\\x00c\\x9bd\te\nf\\x0dg\r 50%|bar|\r\r"


def test_an_endless_error_is_cut(vitft: Run) -> None:
    told = vitft("inspect", "x" * 5000, code=2).stderr
    assert len(told) < 2100
    assert told.endswith("characters)\n")
