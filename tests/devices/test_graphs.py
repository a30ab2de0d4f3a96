"""Recording on CUDA, with a stand-in for CUDA that computes nothing while it captures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from vitft.devices.graphs import WARM_UP, Recorded


class Stream:
    """Notes for which stream it waits."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)
        self.waited.append(other)


class Graph:
    """Keeps what was to be computed while it was captured, and computes that when replayed."""

    def __init__(self) -> None:
        self.kept: list[Callable[[], None]] = []

    def replay(self) -> None:
        for operation in self.kept:
            operation()


class Cuda:
    """The part of torch.cuda that recording needs; `compute` stands for a kernel's launch."""

    Stream, CUDAGraph = Stream, Graph

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.capturing: Graph | None = None

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads load images meanwhile
        self.capturing = graph
        with self.stream(stream):
            yield
        self.capturing = None

    def compute(self, operation: Callable[[], None]) -> None:
        if self.capturing is None:
            operation()
        else:
            self.capturing.kept.append(operation)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_recorded_step_computes_what_the_step_does(cuda: Cuda) -> None:
    found: list[float] = []

    def step(x: Tensor, y: Tensor) -> None:
        cuda.compute(lambda: found.append((x * y).sum().item()))

    inputs = [(torch.randn(4), torch.randn(4)) for _ in range(7)]
    inputs += [(torch.randn(2), torch.randn(2)) for _ in range(6)]  # a last, smaller batch
    inputs += [(torch.randn(4).double(), torch.randn(4)) for _ in range(5)]
    inputs = inputs[::2] + inputs[1::2]
    recorded = Recorded(step)
    for pair in inputs:
        recorded(*pair)
    assert found == [(x * y).sum().item() for x, y in inputs]


def test_inputs_that_are_recorded_are_copied(cuda: Cuda) -> None:
    seen: list[Tensor] = []
    recorded = Recorded(seen.append)
    inputs = [torch.randn(3) for _ in range(WARM_UP + 3)]
    for x in inputs:
        recorded(x)
    assert all(a is b for a, b in zip(seen, inputs[:WARM_UP], strict=False))
    assert len(seen) == WARM_UP + 1  # once more, to record it
    assert seen[-1] is not inputs[WARM_UP]
    assert torch.equal(seen[-1], inputs[-1])
    assert inputs[WARM_UP].ne(inputs[-1]).all()


def test_steps_before_the_recording_run_on_a_stream_that_waits_and_is_waited_for(
    cuda: Cuda,
) -> None:
    streams: list[Any] = []
    recorded = Recorded(lambda: streams.append((cuda.current, cuda.capturing is None)))
    for _ in range(WARM_UP + 2):
        recorded()
    side = recorded.stream
    assert isinstance(side, Stream)
    assert side is not cuda.main
    assert streams == [(side, True)] * WARM_UP + [(side, False)]
    assert side.waited == [cuda.main] * WARM_UP
    assert cuda.main.waited == [side] * WARM_UP
