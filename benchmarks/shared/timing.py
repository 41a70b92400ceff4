"""Timing of several sides that take turns, each in its own process, and the peak speed of a device.

With one process each, a side is independent of process-wide state of the others (such as how the C library keeps freed
memory), and its peak memory can be measured.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

from utils.cli import UserError

from .script import print_table, with_range
from .work import Work, count_flops

Side = TypeVar("Side")


class Run(NamedTuple):
    """The duration of one turn, and the peak memory in bytes of its process until then, if it was measured."""

    seconds: float
    peak_memory: int = 0


class Worker:
    """A process that prepares some work and does it at every call.

    The constructor does the work once to warm up, so that memory is allocated and kernels are compiled; `first` is that
    run.

    Args:
        device: of the work.
        prepare: called in the process and therefore picklable; returns the work.
        in_a_row: repetitions in a turn; the seconds of a run are those of one repetition.
        environment: additional variables of the process.
    """

    def __init__(self, device: Any, prepare: Callable[[], Work], in_a_row: int, environment: Mapping[str, str]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, prepare, in_a_row))
        with patch.dict(os.environ, environment):
            self._process.start()
        theirs.close()  # so that the pipe closes when the process ends
        self.first = self()

    def __call__(self, *args: object) -> Run:
        """Do the work with these arguments.

        Raises:
            UserError: if the process ended with an error, which it has printed.
        """
        try:
            self._pipe.send(args)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise UserError("one side ended before it was done, for the reason given above") from error

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


@contextmanager
def start_workers(
    device: Any,
    sides: Mapping[Side, Callable[[], Work]],
    in_a_row: int = 1,
    environments: Mapping[Side, Mapping[str, str]] = MappingProxyType({}),
) -> Iterator[dict[Side, Worker]]:
    """Run a worker for each side during the block; arguments as for `Worker`."""
    with ExitStack() as stack:
        workers = {}
        for side, prepare in sides.items():
            workers[side] = Worker(device, prepare, in_a_row, environments.get(side, {}))
            stack.callback(workers[side].close)
        yield workers


def take_turns(sides: Mapping[Side, Callable[[], Run]], repeats: int) -> dict[Side, list[Run]]:
    """Run the sides alternately, A B A B …, so that a slow phase of the machine affects all of them."""
    runs: dict[Side, list[Run]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, work in sides.items():
            runs[side].append(work())
    return runs


def median_seconds(runs: Sequence[Run]) -> float:
    """Return the median over turns."""
    return median(run.seconds for run in runs)


def peak_memory(runs: Sequence[Run]) -> str:
    """Return the peak memory of all turns."""
    return f"{runs[-1].peak_memory / 2**20:,.0f} MiB"


def ratio(slow: Sequence[Run], fast: Sequence[Run], scale: float = 1.0) -> str:
    """Return how many times as long `slow` took, turn by turn: the median with the lowest and the highest ratio."""
    return with_range([scale * a.seconds / b.seconds for a, b in zip(slow, fast, strict=True)], median)


def load_config(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the config and the device that the flags name, and print them."""
    import torch

    import config as configs
    from utils.device import pick_device

    config, device = configs.get_config(args.dataset), pick_device(args.gpu_id)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"the CPU (threads: {torch.get_num_threads()})"
    print(f"{args.dataset}, {config.data.image_size} px, on {name}; medians of {args.repeats} turns")
    return config, device


def compare_sides(
    prepare: Mapping[str, Callable[..., Work]], args: argparse.Namespace, config: Any, device: Any, *, training: bool
) -> None:
    """Time training steps or forward passes of the network; print seconds, share of the device's peak and memory.

    `prepare` maps `plain` and `optimised` to functions (config, batch size, device) that return the work.
    """
    import torch

    from utils.device import pick_precision

    precisions = {"plain": torch.float32, "optimised": pick_precision(config.precision, device)}
    peaks = {side: matrix_peak(device, precision) for side, precision in precisions.items()}
    flops = count_flops(config, training=training)
    sides = {side: partial(make, config, args.batch_size, device) for side, make in prepare.items()}
    with start_workers(device, sides, passes_in_a_row(device)) as workers:
        runs = take_turns(workers, args.repeats)
    what = "forward and backward" if training else "forward"
    print(f"{flops / 1e9:.2f} GFLOP a sample {what} (a multiply-add counts as 2)")
    rows = []
    for side, turns in runs.items():
        seconds, precision = median_seconds(turns), str(precisions[side]).removeprefix("torch.")
        speed = args.batch_size * flops / seconds
        speeds = [f"{speed / 1e9:,.1f}", f"{peaks[side] / 1e9:,.1f}", f"{speed / peaks[side]:.1%}"]
        rows.append([side, precision, f"{seconds:.4f}", *speeds, peak_memory(turns)])
    print_table(["", "precision", "seconds", "GFLOP/s", "matrix peak", "of it", "peak memory"], rows)
    print(f"plain / optimised: {ratio(runs['plain'], runs['optimised'])}")


def matrix_peak(device: Any, precision: Any) -> float:
    """Return the FLOP/s of the best of five large square matrix products; a multiply-add counts as 2."""
    size = 8192 if device.type == "cuda" else 2048
    sides = {"product": partial(_prepare_product, device, precision, size)}
    with start_workers(device, sides, passes_in_a_row(device)) as workers:
        return 2 * size**3 / min(workers["product"]().seconds for _ in range(5))


def count_calls(work: Work) -> int:
    """Return how many ATen operations the work calls that compute something, each of which launches a kernel or more.

    On the CPU, where backward passes run in the calling thread. Operations that return a view launch nothing.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            makes_view = func.is_view or func._schema.name in ("aten::detach", "aten::_unsafe_view")
            self.calls += func.namespace != "profiler" and not makes_view
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        work()
    return counter.calls


def passes_in_a_row(device: Any) -> int:
    """Return how many passes make a turn: on a GPU enough to make the wait for its result negligible."""
    return 20 if device.type == "cuda" else 1


def memory_peak_of(pid: int | str) -> int:
    """Return the peak memory of a process so far, in bytes; 0 if there is no /proc, or the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _serve(pipe: Connection, device: Any, prepare: Callable[[], Work], in_a_row: int) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = False  # true float32 on both sides
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    work = prepare()
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        wait()
        start = perf_counter()
        for _ in range(in_a_row):
            work(*args)
        wait()
        pipe.send(Run((perf_counter() - start) / in_a_row, _peak_memory(device)))


def _peak_memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # First VmHWM: on Linux, ru_maxrss starts at the peak of the parent process.
    if peak := memory_peak_of("self"):
        return peak
    import resource

    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _prepare_product(device: Any, precision: Any, size: int) -> Work:
    import torch

    a, b = torch.randn(2, size, size, device=device).to(precision)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
