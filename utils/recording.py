"""CUDA graphs: record the kernels of a function once, then launch all of them at a time.

Launched one by one from Python, the kernels of a small network take less time than the launches between them.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

PLAIN_CALLS = 3  # before recording, in which cuDNN and cuBLAS allocate their workspaces and choose their kernels


def available(device: torch.device) -> bool:
    """Whether functions can be recorded on the device."""
    return device.type == "cuda"


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class Graph:
    """The kernels that `work` launches, captured without running them.

    Attributes:
        outputs: return value of `work`; every replay overwrites its tensors.

    Raises:
        RuntimeError: if `work` does anything that a graph cannot hold, such as waiting for a value.
    """

    def __init__(self, work: Callable[[], Tensor | None]):
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            # thread_local, because other threads pin memory meanwhile (`utils.device.Prefetcher`, the data loader's).
            with torch.cuda.graph(self._graph, stream=_side_stream(), capture_error_mode="thread_local"):
                self.outputs = work()
        finally:
            torch.cuda.set_stream(current)  # torch stays on the capturing stream after a failure

    def replay(self) -> None:
        """Run the kernels."""
        self._graph.replay()

    @staticmethod
    def warm_up(work: Callable[[], Tensor | None]) -> Tensor | None:
        """Call `work` on the stream that will capture it, for which CUDA's libraries then allocate their workspaces."""
        side = _side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = work()
        torch.cuda.current_stream().wait_stream(side)
        return outputs


class Recorded:
    """A function of tensors that is recorded after a few calls, and replayed in later ones.

    All calls compute the same: the inputs are copied into fixed buffers, random numbers follow the seed set before the
    call, and tensors that `work` changes in place (weights, moments) change in every replay. Inputs of other shapes are
    recorded anew. If recording fails, `report` gets the reason and `work` is called as it is.

    Args:
        work: function of tensors whose shapes are fixed, and which nothing on the host waits for.
        name: name of what it does, for the message.
        report: called with a message.
    """

    def __init__(self, work: Callable[..., Tensor | None], name: str, report: Callable[[str], object] = print):
        self.work, self.name, self.report = work, name, report
        self.graph: Graph | None = None
        self.failed = False
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Return the result of `work`; the next call overwrites it."""
        if self.failed:
            return self.work(*inputs)
        shapes = [tensor.shape for tensor in inputs]
        if shapes != self._shapes:
            self.graph, self._shapes, self._plain_calls = None, shapes, 0
        if self.graph is None:
            if self._plain_calls < PLAIN_CALLS:
                self._plain_calls += 1
                return Graph.warm_up(lambda: self.work(*inputs))
            self._buffers = [tensor.clone() for tensor in inputs]
            try:
                self.graph = Graph(lambda: self.work(*self._buffers))
            except RuntimeError as error:
                self.failed = True
                reason = next(iter(str(error).splitlines()), "")
                self.report(f"{self.name} cannot be recorded as a CUDA graph ({reason}): slower, with the same results")
                return self.work(*inputs)
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.graph.outputs


class RecordedPasses(nn.Module):
    """A network that runs all its passes in one batch size, so that a single shape is compiled and recorded.

    The first batch sets the size. Smaller ones are filled up with copies of their last sample; a larger one is split if
    the network is compiled, and else sets the size anew. Samples do not depend on each other, so that this changes no
    result.

    Args:
        network: maps tensors [N, …] to a tensor [N, …].
        accelerate: `accelerate(network, call)` returns the network to use after the first pass, which shows that the
            batch fits into memory; `call(network)` repeats that pass.
    """

    def __init__(
        self,
        network: nn.Module,
        accelerate: Callable[[nn.Module, Callable], Callable[..., Tensor]] = lambda network, call: network,
    ):
        super().__init__()
        self.network, self.accelerate = network, accelerate
        self.size: int | None = None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the network's output for a batch of any size.

        Raises:
            torch.cuda.OutOfMemoryError: if the batch does not fit. A smaller one then sets the size anew.
        """
        try:
            if self.size is None or (len(args[0]) > self.size and not self._accelerated):
                return self._run_first(args, kwargs)
            return self._run((*args, *kwargs.values()))
        except torch.cuda.OutOfMemoryError:
            self.size = self._recorded = None
            raise

    def _run_first(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        output = self.network(*args, **kwargs)
        network = self.accelerate(self.network, lambda network: network(*args, **kwargs))
        self._accelerated = network is not self.network

        def work(*inputs: Tensor) -> Tensor:
            return network(*inputs[: len(args)], **dict(zip(kwargs, inputs[len(args) :], strict=True)))

        self._recorded = Recorded(work, "a network pass")
        self.size = len(output)
        return output

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        n = len(inputs[0])
        if n > self.size:
            return torch.cat([self._run(part) for part in zip(*(x.split(self.size) for x in inputs), strict=True)])
        if n < self.size:
            inputs = tuple(torch.cat([x, x[-1:].expand(self.size - n, *x.shape[1:])]) for x in inputs)
        return self._recorded(*inputs)[:n].clone()
