"""`--quiet` leaves results and errors, `--verbose` adds what helps to find a fault."""

import logging
from pathlib import Path

import pytest

from tests.shared import Run

FLAGS = ["--adapter=lora", "--epochs=1", "--batch-size=16"]


def test_a_quiet_command_tells_what_ends_it(vitft: Run, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    given = ["--base=cifar10", "--data=shapes", "--out", tmp_path, *FLAGS]
    assert vitft("finetune", *given, "-q", code=2).stderr == (
        f"Error: {tmp_path} holds a run already; use --resume, --overwrite or another --out\n"
    )


def test_a_quiet_command_tells_errors_that_end_nothing(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    whole = folder / "test" / "red" / "000.png"
    given = ["--base", base, tmp_path / "broken.png", whole, "--skip-broken"]
    done = vitft("predict", *given, "--quiet")
    assert done.stderr.startswith("skipped: ")
    assert done.stderr.count("\n") == 1
    assert "red" in done.stdout


def test_a_verbose_command_tells_what_it_computes_with(
    vitft: Run, base: Path, folder: Path, tmp_path: Path
) -> None:
    given = ["--base", base, "--data", folder, "--out", tmp_path, *FLAGS]
    told = vitft("finetune", *given, "--verbose").stderr
    for line in (
        ", torch 2.",
        "    batch_size = 16",
        "adapter: LoRAConfig(",
        "device cpu: cpu, 1 threads, ",
        "model: ViTConfig(dim=16, ",
        "trains: blocks.*.attn.wq.lora_a  8x16  torch.float32  (2 of them)",
        "trains: head.weight  3x16  torch.float32",
        "images to train: 54, held on cpu as 54x3x8x8  torch.uint8",
        "images to validation: 6, ",
        "plan: lr = 0.003",
        "peak memory ",
    ):
        assert line in told, line
    assert "finetune, with defaults" not in vitft("inspect", tmp_path).stderr
    logger = logging.getLogger("vitft")
    assert (logger.level, logger.handlers, logger.propagate) == (logging.NOTSET, [], True)


def test_a_verbose_command_shows_no_traceback_for_the_users_mistake(
    vitft: Run, tmp_path: Path
) -> None:
    told = vitft("inspect", tmp_path / "nothing", "--verbose", code=2).stderr
    assert "options of vitft inspect, with defaults:" in told
    assert told.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in told


def test_a_token_is_not_told(vitft: Run, tmp_path: Path) -> None:
    given = ["--base", tmp_path / "nothing", "--token=secret"]
    told = vitft("serve", *given, "--verbose", code=2).stderr
    assert "token = '...'" in told
    assert "secret" not in told


def test_quiet_and_verbose_contradict_each_other(vitft: Run) -> None:
    told = vitft("data", "--quiet", "--verbose", code=2).stderr
    assert told == "Error: --quiet and --verbose contradict each other; choose one\n"


@pytest.mark.parametrize("command", ["pretrain", "sweep", "predict", "check"])
def test_every_command_can_be_quiet(command: str, vitft: Run) -> None:
    told = vitft(command, "--help").stdout
    assert "-q, --quiet" in told
    assert "-v, --verbose" in told
