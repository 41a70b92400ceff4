"""Measure a GPU: its peaks, a training step and a network pass (plain, recorded, compiled), slices, and start-up times.

Networks are untrained and slices synthetic, neither of which changes the amount of computation. What has to be compiled
is compiled into a temporary folder: once from scratch, once from the cache that the first time left there.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import timing
from benchmarks.shared.script import create_parser, print_table, require_at_least
from benchmarks.shared.sweep import Sweep, prepare_optimised_score, whole_sweep
from benchmarks.shared.work import Work, count_flops, prepare_optimised_pass, prepare_optimised_step
from utils.cli import UserError, run

MANY = 10**9  # samples to come, enough to repay compiling


def main() -> None:
    args = parse_args()
    import torch

    from utils.device import pick_precision

    if args.gpu_id == "cpu" or not torch.cuda.is_available():
        raise UserError("no CUDA device to measure: for a CPU, there are benchmarks/training.py and scoring.py")
    config, device = timing.load_config(args)
    precision = pick_precision(config.precision, device)
    peak = timing.matrix_peak(device, precision)
    print(f"{peak / 1e12:,.0f} TFLOP/s in matrix products of {precision}, {copy_rate(device) / 1e12:.1f} TB/s copied\n")
    with tempfile.TemporaryDirectory() as cache:
        measure(args, config, device, peak, {"TORCHINDUCTOR_CACHE_DIR": cache})
    measure_slices(args, config, device)


def parse_args() -> argparse.Namespace:
    parser = create_parser(
        __doc__,
        gpu_id="0",
        dataset="brats",
        repeats=3,
        batch_size=(32, "samples of a training step"),
        pass_sizes=([32, 512], "samples of a network pass"),
        slices=(139, "slices of a test set; of `paper`, 4 are timed"),
    )
    return require_at_least(parser.parse_args(), repeats=1, batch_size=1, slices=1)


def measure(args: argparse.Namespace, config: Any, device: Any, peak: float, cache: dict[str, str]) -> None:
    """Print a table of steps and passes, each measured in a process of its own."""
    config.score_model.training.batch_size = args.batch_size
    works = {
        f"step of {args.batch_size}": (prepare_optimised_step, args.batch_size, count_flops(config, training=True))
    }
    for size in args.pass_sizes:
        works[f"pass of {size}"] = (prepare_optimised_pass, size, count_flops(config, training=False))
    rows = []
    for name, (make, size, flops) in works.items():
        for how in ("plain", "recorded", "compiled and recorded", "compiled, from the cache"):
            started = perf_counter()
            sides = {how: partial(prepare, make, config, size, device, how)}
            with timing.start_workers(device, sides, 1, {how: cache}) as workers:
                first = perf_counter() - started
                workers[how](10)
                runs = [workers[how](10) for _ in range(args.repeats)]
            seconds = timing.median_seconds(runs) / 10
            rate = size * flops / seconds / peak
            speeds = [f"{1e3 * seconds:.2f}", f"{size / seconds:,.0f}", f"{rate:.1%}", timing.peak_memory(runs)]
            kernels = f"{count_kernels(make, config, size, device):,}" if how == "recorded" else ""
            rows.append([f"{name}, {how}", *speeds, kernels, f"{first:.0f}"])
    print_table(["", "ms", "samples/s", "of the peak", "memory", "kernels", "s to the first"], rows)


def prepare(make: Callable[..., Work], config: Any, size: int, device: Any, how: str) -> Work:
    """Return a function that does several of the steps or passes that `make` prepares, recorded or compiled or not."""
    from utils import recording

    if how == "plain":
        recording.PLAIN_CALLS = sys.maxsize
    work = make(config, size, device, MANY if how.startswith("compiled") else 0)

    def repeat(times: int = 1) -> None:
        for _ in range(times):
            work()

    return repeat


def count_kernels(make: Callable[..., Work], config: Any, size: int, device: Any) -> int:
    """Return the number of kernels that a step or pass launches if nothing is compiled."""
    from unittest.mock import patch

    import torch
    from torch.profiler import ProfilerActivity, profile

    from utils import recording

    with patch.object(recording, "PLAIN_CALLS", sys.maxsize):
        work = prepare(make, config, size, device, "recorded")
        work(2)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            work()
            torch.cuda.synchronize(device)
    del work
    torch.cuda.empty_cache()  # for the processes to come
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def copy_rate(device: Any) -> float:
    """Return the bytes a second that copying 2 GiB reads and writes."""
    import torch

    source = torch.zeros(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def measure_slices(args: argparse.Namespace, config: Any, device: Any) -> None:
    """Print the seconds a slice of both presets; those of `paper` are compiled, as they are in a test of all slices."""
    rows: list[Sequence[str]] = []
    for preset, n_slices in (("fast", args.slices), ("paper", min(args.slices, 4))):
        sweep = whole_sweep(config, preset)
        samples = MANY if preset == "paper" else 0
        with timing.start_workers(
            device, {preset: partial(prepare_slices, sweep, device, n_slices, samples)}
        ) as workers:
            run = workers[preset]()  # the one before has set the batch size, compiled and recorded
        seconds = run.seconds / n_slices
        whole = f"{args.slices * seconds / 60:.1f}"
        rows.append([preset, f"{sweep.passes:,}", f"{seconds:.3f}", whole, timing.peak_memory([run])])
    print()
    print_table(["", "passes a slice", "s a slice", f"minutes for {args.slices}", "memory"], rows)


def prepare_slices(sweep: Sweep, device: Any, n_slices: int, samples: int) -> Work:
    """Return a function that scores all slices, whose networks are compiled if `samples` to come repay it."""
    return partial(prepare_optimised_score(sweep, device, n_slices, samples), n_slices)


if __name__ == "__main__":
    run(main)
