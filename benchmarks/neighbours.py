"""Time training and scoring on cores shared with other processes, for different limits of OpenMP's active waiting.

    python benchmarks/neighbours.py --spins default 1000 10000 100000

The neighbours are processes of equal priority that multiply matrices, one thread each. The sides take turns, on the
idle machine and beside them. A number is GOMP_SPINCOUNT, `default` leaves it unset; the command lines set it to
`SPIN_COUNT` of utils/cli.py.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.script import create_parser, print_table, require_at_least
from benchmarks.shared.timing import load_config, median_seconds, ratio, start_workers, take_turns
from benchmarks.shared.work import prepare_optimised_pass, prepare_optimised_step
from utils.cli import SPIN_COUNT, SPIN_VARIABLES, run

DEFAULT = "default"


def main() -> None:
    args = parse_args()
    for name in SPIN_VARIABLES:  # of this process, so that the sides do not inherit them
        os.environ.pop(name, None)
    config, device = load_config(args)
    config.score_model.training.batch_size = args.batch_size
    works = {"training": prepare_optimised_step, "scoring": prepare_optimised_pass}
    sides = {
        (work, spins): partial(prepare, config, args.batch_size, device)
        for work, prepare in works.items()
        for spins in args.spins
    }
    environments = {side: {"GOMP_SPINCOUNT": side[1]} for side in sides if side[1] != DEFAULT}
    with start_workers(device, sides, args.steps, environments) as workers:
        for neighbours in (0, args.neighbours):
            with busy(neighbours):
                runs = take_turns(workers, args.repeats)
            print(f"\nbeside {neighbours} busy processes" if neighbours else "\non the idle machine")
            rows = []
            for (work, spins), turns in runs.items():
                speed = args.batch_size / median_seconds(turns)
                rows.append([f"{work}, {spins}", f"{speed:.1f}", ratio(runs[work, args.spins[0]], turns)])
            print_table(["", "images a second", f"times as fast as with {args.spins[0]}"], rows)


def parse_args() -> argparse.Namespace:
    parser = create_parser(
        __doc__,
        dataset="phantom",
        repeats=5,
        batch_size=(4, "slices of a training step and of a network pass"),
        steps=(20, "training steps, and network passes, of a turn"),
        neighbours=(2, "number of busy processes"),
        spins=([DEFAULT, SPIN_COUNT], "values of GOMP_SPINCOUNT; the first is the baseline"),
    )
    parser.set_defaults(gpu_id="cpu")
    return require_at_least(parser.parse_args(), repeats=1, batch_size=1, steps=1, neighbours=1)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run `n` processes that multiply matrices during the block."""
    neighbours = [get_context("spawn").Process(target=multiply, daemon=True) for _ in range(n)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()


def multiply() -> Any:
    """Multiply matrices endlessly."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        torch.mm(a, a)


if __name__ == "__main__":
    run(main)
