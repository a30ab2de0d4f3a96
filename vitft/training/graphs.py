"""A training step on CUDA, recorded once for its inputs' shapes and replayed as one launch."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM_UP = 3  # steps taken as written before one is recorded: they allocate, and choose kernels


class Recorded:
    """Takes a step as written a few times, then records it as a CUDA graph and replays that.

    The step must neither wait for the device nor depend on anything but its inputs and what stays
    in its place in memory, and it may change nothing else.

    Args:
        step: what to do with the inputs.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.key: Hashable = None
        self.n_taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> None:
        """Take the step."""
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key != self.key:
            self.key, self.n_taken, self.graph = key, 0, None
        if self.n_taken < WARM_UP:
            self.n_taken += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            # of this thread alone: another one may be loading images
            alone = "thread_local"
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode=alone):
                self.step(*self.inputs)
        for held, x in zip(self.inputs, inputs, strict=True):
            held.copy_(x)
        self.graph.replay()
