"""A training step on CUDA, recorded once for its inputs' shapes and replayed as one launch."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # steps taken as written before one is recorded: they allocate, and choose kernels


class Recorded:
    """Takes a step as written a few times, then records it as a CUDA graph and replays that.

    Inputs of other shapes, such as a last, smaller batch, have a recording of their own.
    The step must not synchronise, and may only read and write tensors whose addresses never change.

    Args:
        step: what to do with the inputs.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.n_taken: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Take the step."""
        key = tuple((x.shape, x.dtype) for x in inputs)
        self.n_taken[key] = self.n_taken.get(key, 0) + 1
        if self.n_taken[key] <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if key not in self.recordings:
            self.recordings[key] = self._record(inputs)
        graph, held = self.recordings[key]
        for place, x in zip(held, inputs, strict=True):
            place.copy_(x)
        graph.replay()

    def _record(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Return the step as a graph, and the tensors that it reads its inputs from."""
        held, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        # of this thread alone: another one may be loading images
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(*held)
        return graph, held
