"""A training step on CUDA, recorded once for each shape of its inputs, replayed as one launch."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before one is recorded: they allocate memory and choose kernels


class Recorded:
    """Runs a step eagerly a few times, then records it as a CUDA graph and replays the graph.

    Inputs of other shapes, such as a last, smaller batch, get a separate recording. The step must
    not synchronise, and may only read and write tensors whose addresses never change.

    Args:
        step: computes with the inputs.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.n_taken: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Take the step with these inputs, which are tensors on the GPU."""
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
        for own_input, x in zip(held, inputs, strict=True):
            own_input.copy_(x)
        graph.replay()

    def _record(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Return the step as a graph, and the tensors that it reads its inputs from."""
        held, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        # capture this thread only, since another one may be loading images
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(*held)
        return graph, held
