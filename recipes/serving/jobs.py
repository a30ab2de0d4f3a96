"""A queue of pictures, and a thread that answers many of them in one pass."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor


class Busy(Exception):
    """The queue of pictures is full."""


@dataclass
class Job:
    """A picture that waits for its answer.

    Attributes:
        image: uint8 (C, image_size, image_size).
        slots: in the bank, of the adapters that are to answer.
        attention: whether to answer with attention instead of probabilities.
        answer: will hold the probabilities (n_slots, most classes), or the attention (n_slots,
            rows, columns) to the patches.
    """

    image: Tensor
    slots: list[int]
    attention: bool = False
    answer: "Future[Tensor]" = field(default_factory=Future)


class Jobs:
    """A queue of jobs, and the thread that answers them.

    Args:
        answer: sets the answers of the jobs that it is given.
        max_rows: `answer` gets more jobs only while all their slots together are fewer.
        max_waiting: jobs that may wait; more are refused.
    """

    def __init__(
        self, answer: Callable[[Sequence[Job]], None], *, max_rows: int, max_waiting: int
    ) -> None:
        self.answer, self.max_rows = answer, max_rows
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def put(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            Busy: too many wait.
        """
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy("too many pictures wait; ask again later") from None

    def close(self) -> None:
        """Answer the jobs that wait, then end the thread."""
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
        except Exception as error:  # those who wait get it, and the thread goes on
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
