"""What the timed benchmarks share: sides that take turns, each in a process of its own, and what a device can do.

Only a process of its own keeps a side from what the other sets for the whole process (how the C library keeps
memory, say), and tells its peak memory.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

from utils.cli import ArgumentParser, UserError

from .work import Work, count_flops


class Run(NamedTuple):
    """One turn of a worker. Peak memory, in bytes, is that of all its turns so far."""

    seconds: float
    peak_memory: int


class Worker:
    """A process that prepares some work and then does it whenever it is asked to; a context manager.

    It does the work once to warm up: memory is then there, and kernels are chosen or compiled. `first` is that run.

    Args:
        device: the torch.device of the work.
        prepare: called in the process, so it has to be picklable; what it returns is the work.
        in_a_row: how often a turn does the work; its seconds are those of one time.
        environment: variables of the process beside those of this one.
    """

    def __init__(
        self, device: Any, prepare: Callable[[], Work], in_a_row: int = 1, environment: Mapping[str, str] | None = None
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, prepare, in_a_row))
        with patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.first = self.run()

    def run(self, *args: object) -> Run:
        """Do the work with these arguments.

        Raises:
            UserError: the process ended with an error, which it has printed.
        """
        try:
            self._pipe.send(args)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise UserError("one side ended before it was done, for the reason given above") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe.close()
        self._process.join()


def take_turns(workers: Mapping[str, Worker], repeats: int) -> dict[str, list[Run]]:
    """The runs of every worker, `repeats` of each: A B A B …, so that a slow moment of the machine meets them all."""
    runs: dict[str, list[Run]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            runs[name].append(worker.run())
    return runs


def median_seconds(runs: Sequence[Run]) -> float:
    """The median over turns."""
    return median(run.seconds for run in runs)


def peak_memory(runs: Sequence[Run]) -> str:
    """The peak of the last turn, which is that of them all."""
    return f"{runs[-1].peak_memory / 2**20:,.0f} MiB"


def ratio(slow: Sequence[Run], fast: Sequence[Run], scale: float = 1.0) -> str:
    """How many times as long `slow` took, turn by turn: the median and the lowest … highest ratio."""
    ratios = [scale * a.seconds / b.seconds for a, b in zip(slow, fast, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their columns, all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def print_reached(
    runs: Mapping[str, Sequence[Run]], flops: float, precisions: Mapping[str, Any], peaks: Mapping[str, float]
) -> None:
    """A table of the sides: seconds, how near to the device's peak they come, memory.

    Args:
        runs: of every side.
        flops: of the work that a run is.
        precisions: the torch.dtype of every side.
        peaks: FLOP/s of the device in that precision.
    """
    rows = []
    for side, turns in runs.items():
        seconds = median_seconds(turns)
        rows.append(
            [
                side,
                str(precisions[side]).removeprefix("torch."),
                f"{seconds:.4f}",
                f"{flops / seconds / 1e9:,.1f}",
                f"{peaks[side] / 1e9:,.1f}",
                f"{flops / seconds / peaks[side]:.1%}",
                peak_memory(turns),
            ]
        )
    print_table(["", "precision", "seconds", "GFLOP/s", "matrix peak", "of it", "peak memory"], rows)


def compare_sides(
    prepare: Mapping[str, Callable[..., Work]], args: Any, config: Any, device: Any, *, training: bool
) -> None:
    """Time the network's work, `plain` and `optimised`; print seconds, how near to the device's peak, and the ratio.

    Args:
        prepare: of either side, what makes its work of (config, batch size, device).
        args: with batch_size and repeats.
        config: of the network.
        device: the torch.device.
        training: whether the work is a training step, or a forward pass.
    """
    import torch

    from utils.device import pick_precision

    precisions = {"plain": torch.float32, "optimised": pick_precision(config.precision, device)}
    peaks = {side: matrix_peak(device, precision) for side, precision in precisions.items()}
    flops = count_flops(config, training=training)
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(
                Worker(device, partial(make, config, args.batch_size, device), passes_in_a_row(device))
            )
            for side, make in prepare.items()
        }
        runs = take_turns(workers, args.repeats)
    what = "forward and backward" if training else "forward"
    print(f"{flops / 1e9:.2f} GFLOP a sample {what} (a multiply-add counts as 2)")
    print_reached(runs, args.batch_size * flops, precisions, peaks)
    print(f"plain / optimised: {ratio(runs['plain'], runs['optimised'])}")


def matrix_peak(device: Any, precision: Any) -> float:
    """FLOP/s of the best of five large square matrix products; a multiply-add counts as 2."""
    size = 8192 if device.type == "cuda" else 2048
    work = partial(_prepare_product, device, precision, size)
    with Worker(device, work, passes_in_a_row(device)) as worker:
        return 2 * size**3 / min(worker.run().seconds for _ in range(5))


def describe(device: Any) -> str:
    """The device, in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU (threads: {torch.get_num_threads()})"


def passes_in_a_row(device: Any) -> int:
    """How many short pieces of work make a turn: on a GPU so many that waiting for its answer does not count."""
    return 20 if device.type == "cuda" else 1


def add_flags(parser: ArgumentParser) -> None:
    """The flags that the timed benchmarks share."""
    add = parser.add_argument
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    add(
        "--dataset",
        default="brats",
        help="whose networks are timed: brats (the paper's) or phantom (the demo's)",
    )
    add("--repeats", type=int, default=5, help="turns of each side that the medians are taken over")


def check_at_least_one(args: Any, *flags: str) -> None:
    """Refuse flags below 1.

    Raises:
        UserError: the first of them.
    """
    for flag in flags:
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}")


def _serve(pipe: Connection, device: Any, prepare: Callable[[], Work], in_a_row: int) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = False  # of both sides, float32 is float32
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
    # On Linux ru_maxrss begins at the peak of the process that started this one; VmHWM knows this one alone.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _prepare_product(device: Any, precision: Any, size: int) -> Work:
    import torch

    a, b = torch.randn(2, size, size, device=device).to(precision)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
