"""Pictures that wait, and a thread that answers them, many in one pass."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor


class Busy(Exception):
    """More pictures wait than may."""


@dataclass
class Job:
    """A picture that waits for its answer.

    Attributes:
        image: uint8 (C, image_size, image_size).
        slots: of the adapters that are to answer.
        look: whether attention is asked for, not classes.
        answer: gets the probabilities (n_slots, most classes), or the attention (n_slots, rows,
            columns) of the patches.
    """

    image: Tensor
    slots: list[int]
    look: bool = False
    answer: "Future[Tensor]" = field(default_factory=Future)


class Jobs:
    """Jobs that wait, and the thread that answers them.

    Args:
        answer: sets the answers of some jobs.
        max_rows: adapters' answers that it is to give at a time, those of one job at least.
        max_waiting: jobs; more are refused.
    """

    def __init__(
        self, answer: Callable[[Sequence[Job]], None], *, max_rows: int, max_waiting: int
    ) -> None:
        self.answer, self.max_rows = answer, max_rows
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def put(self, job: Job) -> None:
        """Let a job wait.

        Raises:
            Busy: too many wait.
        """
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy("too many pictures wait; ask again later") from None

    def close(self) -> None:
        """Let the thread end once all that waits is answered."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        job = self.waiting.get()
        while job is not None:
            jobs, n_rows = [job], len(job.slots)
            while n_rows < self.max_rows:
                try:
                    job = self.waiting.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    break
                jobs.append(job)
                n_rows += len(job.slots)
            self._answer(jobs)
            if job is not None:
                job = self.waiting.get()

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            self.answer(jobs)
        except Exception as error:  # which belongs to those who wait, not to this thread
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
