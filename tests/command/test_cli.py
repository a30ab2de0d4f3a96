import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from benchmarks.trouble import Command
from tests.shared import TINY_FLAGS, Run, paint
from vitft.command.help import COMMANDS
from vitft.version import __version__

COMMON = [
    *("data", "out", "epochs", "batch-size", "lr", "weight-decay"),
    *("seed", "device", "limit", "resume", "preset"),
]


@pytest.fixture(scope="module")
def base(vitft: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of `vitft pretrain`."""
    out = tmp_path_factory.mktemp("runs") / "base"
    vitft("pretrain", "--data", folder, "--out", out, "--epochs=2", "--batch-size=8", *TINY_FLAGS)
    return out


@pytest.fixture(scope="module")
def adapter(vitft: Run, folder: Path, base: Path) -> Path:
    """Return the folder of a finished run of `vitft finetune --adapter lora`."""
    out = base.parent / "lora"
    model = base / "model.safetensors"
    vitft(
        "finetune",
        "--adapter=lora",
        "--rank=2",
        "--base",
        model,
        "--data",
        folder,
        "--out",
        out,
        "--epochs=1",
    )
    return out


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    gone = multiprocessing.get_context("fork").Event()

    def wait() -> None:
        gone.wait()

    command = Command(["data"], wait)
    command.output.close()
    gone.set()
    command.process.join(60)
    assert command.process.exitcode == 0


def test_help_is_quick() -> None:
    seconds = []  # of a core's work, which other processes do not lengthen as they do the wait
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "vitft", "--help"], capture_output=True, text=True
        )
        after = os.times()
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 0.3  # torch alone takes a second
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_ends_the_process(number: int, unread: bool) -> None:
    swallows = f"""if True:
        import importlib, os, sys
        from vitft.command.cli import main
        def swallow(name):
            try:
                os.close(2) if {unread} else None
                os.kill(os.getpid(), {number:d})
                for _ in range(1000): pass
            except BaseException:
                os._exit(0)
        importlib.import_module = swallow
        sys.argv = ["vitft", "data"]
        main()
    """
    done = subprocess.run([sys.executable, "-c", swallows], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == ("" if unread else "Stopped: interrupted\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    parameters = importlib.import_module(f"recipes.{command}").command.params
    options = [p for p in parameters if isinstance(p, click.Option)]
    assert all(option.help and len(option.help) > 4 for option in options)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_training_commands_have_the_contracts_options(vitft: Run, command: str) -> None:
    text = vitft(command, "--help").stdout
    extra = (
        ["adapter", "base", "rank", "alpha", "dropout", "targets"] if command == "finetune" else []
    )
    assert all(f"--{name}" in text for name in COMMON + extra)


def test_results_go_to_stdout_and_progress_to_stderr(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--data", folder, "--out", tmp_path / "x", "--epochs=1"]
    done = vitft("finetune", "--adapter=linear", "--base", base, *flags)
    assert "test accuracy" in done.stdout
    assert "epoch   1" in done.stderr
    assert "epoch" not in done.stdout


def error(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the one line that tells the user what is wrong."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_wrong_data_is_one_line_and_exit_2(vitft: Run, tmp_path: Path, folder: Path) -> None:
    def pretrain(data: object) -> str:
        return error(
            vitft("pretrain", "--data", data, "--out", tmp_path / "out", *TINY_FLAGS, code=2)
        )

    assert "unknown data set cifar11" in pretrain("cifar11")
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in pretrain(tmp_path / "empty")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "train" / "red" / "000.png").write_bytes(b"no image")
    assert "red/000.png is no readable image" in pretrain(broken)
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "model.safetensors").exists()


def test_a_wrong_base_is_one_line_and_exit_2(
    vitft: Run, tmp_path: Path, folder: Path, base: Path
) -> None:
    def evaluate(path: object) -> str:
        return error(vitft("evaluate", "--base", path, "--data", folder, code=2))

    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "half.safetensors is no whole safetensors file" in evaluate(
        tmp_path / "half.safetensors"
    )
    assert "text.safetensors is no whole safetensors file" in evaluate(
        tmp_path / "text.safetensors"
    )
    assert "there is no base nowhere" in evaluate("nowhere")


def test_an_adapter_for_another_base_is_refused(
    vitft: Run, folder: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    vitft("pretrain", "--data", folder, "--out", other, "--epochs=1", "--seed=7", *TINY_FLAGS)
    done = vitft(
        "evaluate",
        "--base",
        other / "model.safetensors",
        "--adapter",
        adapter,
        "--data",
        folder,
        code=2,
    )
    assert "trained on the base" in error(done)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter=lora", "--targets=wx"], "target 'wx' matches no module;"),
        (["--adapter=lora", "--rank=0"], "rank=0 is not a positive integer"),
        (["--adapter=lora", "--rank=many"], "'many' is not a valid integer"),
        (["--adapter=loraa"], "unknown adapter 'loraa'; choose from lora, dora"),
        (["--adapter=linear", "--rank=4"], "--rank means nothing to --adapter linear"),
        (["--adapter=lora", "--device=tpu"], "unknown device 'tpu'"),
        (["--adapter=lora", "--epochs=0"], "epochs=0 is not positive"),
        (["--adapter=lora", "--preset=none"], "unknown preset 'none'"),
        (["--adapter=lora", "--limit=-1"], "limit=-1 is not positive"),
        (
            ["--adapter=lora", f"--rank={10**400}"],
            "--rank 10000000... is no number to",
        ),
        (["--adapter=lora", f"--rank={2**62}"], "out of memory; try"),
        (["--adapter=lora", "--alpha=1e300"], "--alpha 1e+300 is no number to compute with"),
        (["--adapter=lora", "--rank-pattern=wq=1", f"--alpha-pattern=wq={10**40}"], "no number to"),
        (["--adapter=lora", "--lr=nan"], "--lr nan is no number to compute with"),
        (["--adapter=lora", "--crop=1e-300"], "crop=1e-300 is not in 0.01 <= crop <= 1"),
        ([], "missing: --adapter; vitft finetune --help tells what to give"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(
    vitft: Run, folder: Path, base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    model = base / "model.safetensors"
    done = vitft(
        "finetune", "--base", model, "--data", folder, "--out", tmp_path / "o", *flags, code=2
    )
    assert message in error(done)


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(
    vitft: Run, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = vitft(
        "pretrain", "--data", folder, "--out", tmp_path / "file" / "run", *TINY_FLAGS, code=2
    )
    assert "cannot write" in error(done)


def test_a_run_is_not_overwritten_unasked(vitft: Run, folder: Path, base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    done = vitft("pretrain", "--data", folder, "--out", base, *TINY_FLAGS, code=2)
    assert "holds a run already; use --resume, --overwrite" in error(done)
    assert (base / "model.safetensors").read_bytes() == before


def test_a_run_resumes_only_with_its_options(vitft: Run, folder: Path, base: Path) -> None:
    done = vitft(
        "pretrain", "--data", folder, "--out", base, "--resume", "--lr=9", *TINY_FLAGS, code=2
    )
    assert "was started with" in error(done)


def test_a_foreign_recipes_package_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text(
        "raise ModuleNotFoundError('not meant to be imported')"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['vitft', 'data']"
    code = f"{path}; import vitft.command.cli; vitft.command.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the package 'recipes' in" in error(done)
    assert "an environment of its own" in error(done)


def test_a_prediction_needs_an_image(vitft: Run, base: Path, tmp_path: Path) -> None:
    model = base / "model.safetensors"
    assert "missing: IMAGE; " in error(vitft("predict", "--base", model, code=2))
    paint(tmp_path / "a.png", (1, 2, 3))
    assert "top=0 is not positive" in error(
        vitft("predict", "--base", model, "--top=0", tmp_path / "a.png", code=2)
    )
    assert "there is no image" in error(
        vitft("predict", "--base", model, tmp_path / "b.png", code=2)
    )


def test_predict_takes_the_images_in_a_folder(vitft: Run, base: Path, tmp_path: Path) -> None:
    for name in ("b.png", "a/c.png", ".hidden/d.png"):
        paint(tmp_path / name, (1, 2, 3))
    rows = json.loads(vitft("predict", "--base", base, tmp_path, "--json").stdout)
    assert [row["image"] for row in rows] == [str(tmp_path / n) for n in ("a/c.png", "b.png")]
    (tmp_path / "empty").mkdir()
    told = error(vitft("predict", "--base", base, tmp_path / "empty", code=2))
    assert f"{tmp_path / 'empty'} holds no images" in told


def test_missing_options_are_told_together(vitft: Run) -> None:
    told = "Error: missing: --data, --out, --adapter, --base; vitft finetune --help tells what"
    assert told in error(vitft("finetune", code=2))
    assert "Error: missing: SOURCE, --out; " in error(vitft("convert", code=2))
    assert "Error: missing: IMAGE, --out; " in error(vitft("embed", code=2))


def test_one_class_is_no_task(vitft: Run, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i, name in enumerate(("train/a/1.png", "train/a/2.png", "test/a/1.png")):
        paint(data / name, (i, 2, 3))
    flags = ["--adapter=linear", "--base", base, "--data", data, "--out", tmp_path / "out"]
    assert "has only the class 'a'; add another" in error(vitft("finetune", *flags, code=2))


def test_the_number_of_a_process_mutes_only_what_is_shared(
    vitft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "fashionmnist" in vitft("data").stdout
    assert "there is no base" in vitft("inspect", "nowhere", code=2).stderr


def test_a_want_of_memory_is_one_line_and_exit_2(
    vitft: Run, folder: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--adapter=lora", "--base", base, "--data", folder, "--out", tmp_path]
    told = error(vitft("finetune", *flags, "--rank=1000000000000", code=2))
    assert "out of memory; try half the --batch-size" in told
    assert "choose from pretrain, finetune" in error(vitft("fintune", code=2))


def test_the_version_comes_with_that_of_torch_but_without_its_import() -> None:
    code = "import sys; from vitft.command.cli import main; sys.argv = ['vitft', '--version']\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[1] == "False"
    assert done.stdout.startswith(f"vitft {__version__} (Python {sys.version.split()[0]}, torch ")
