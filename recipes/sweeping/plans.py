"""The runs of a sweep in; commands for any scheduler, a share of the runs, or runs on Ray out."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from recipes.shared.finetuning import CommonOptions
from vitft.command.options import arguments_of

T = TypeVar("T")


def commands(made: Sequence[CommonOptions]) -> list[list[str]]:
    """Return for each run the words of the command that trains it alone."""
    return [["vitft", "finetune", *arguments_of(options)] for options in made]


def plan_text(made: Sequence[CommonOptions]) -> str:
    """Return the commands, one a line."""
    return "".join(shlex.join(command) + "\n" for command in commands(made))


def share(made: Sequence[T], only: str) -> list[T]:
    """Return the runs of the share I/N: every N-th, from the I-th on.

    Raises:
        ValueError: `only` is not I/N, or N is larger than the number of runs.
    """
    first, _, n = only.partition("/")
    if not (first.isdecimal() and n.isdecimal() and 1 <= int(first) <= int(n) <= len(made)):
        raise ValueError(
            f"--only {only} names no share of {len(made)} runs; write I/N, as in 1/4, with I from "
            "1 to N"
        )
    return [*made[int(first) - 1 :: int(n)]]


def run_on_ray(made: Sequence[CommonOptions], *, n_gpus: int) -> None:
    """Train each run as a task of its own on the Ray cluster of $RAY_ADDRESS, or on this machine.

    Args:
        made: the options of the runs; every machine of the cluster must reach their files.
        n_gpus: number of GPUs that each run takes.

    Raises:
        ValueError: Ray is not installed, or a run failed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray; pip install 'vitft[ray]'") from None
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    try:
        task = ray.remote(num_cpus=1, num_gpus=n_gpus)(_run_command)
        errors = ray.get([task.remote(command) for command in commands(made)])
    finally:
        ray.shutdown()
    if failed := [error for error in errors if error]:
        raise ValueError(f"{len(failed)} of {len(made)} runs failed; the first: {failed[0]}")


def _run_command(command: Sequence[str]) -> str:
    """Run a command of vitft; return "", or the last line of its error."""
    done: Any = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
