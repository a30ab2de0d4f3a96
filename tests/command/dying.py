"""`vitft` in which one of two processes dies, or fails, after some steps: see test_torchrun."""

import os
import signal
import sys

from vitft.command.cli import main
from vitft.devices import processes
from vitft.training.run import Run

HOW, N_STEPS = sys.argv[1], 12
update, n_steps = Run.update, 0


def die(run: Run) -> bool:
    """Update a run, unless it is time to die."""
    global n_steps
    n_steps += 1
    if n_steps == N_STEPS and processes.rank() == 1 and not processes.attempt():
        if HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if HOW == "fails":
            raise ValueError("the disk of the second process is gone")
    return update(run)


Run.update = die  # type: ignore[method-assign]
sys.argv = ["vitft", *sys.argv[2:]]
main()
