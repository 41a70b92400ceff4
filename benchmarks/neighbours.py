"""Time training and scoring on cores that other work uses, too, by how long OpenMP's threads wait actively.

    python benchmarks/neighbours.py --spins default 1000 10000 100000

The neighbours are processes of equal priority that multiply matrices, one thread each. The sides take turns, on the
idle machine and beside them: `default` is what OpenMP does if nobody says anything, a number is GOMP_SPINCOUNT. The
scripts set it to that of utils/cli.py.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import (
    Worker,
    check_at_least_one,
    describe,
    median_seconds,
    print_table,
    ratio,
    take_turns,
)
from benchmarks.shared.work import Work, prepare_optimised_pass, prepare_optimised_step
from utils.cli import SPINS, WAITING, ArgumentParser, run

DEFAULT = "default"


def main() -> None:
    args = parse_args()
    for name in WAITING:  # of this process; the sides have their own
        os.environ.pop(name, None)

    import config as configs
    from utils.device import pick_device

    config = configs.get_config(args.dataset)
    config.score_model.training.batch_size = args.batch_size
    device = pick_device("cpu")
    works: dict[str, Work] = {"training": prepare_optimised_step, "scoring": prepare_optimised_pass}
    print(f"{args.dataset}, {config.data.image_size} px, batch {args.batch_size}, on {describe(device)}")
    with ExitStack() as stack:
        sides = {
            (work, spins): stack.enter_context(
                Worker(
                    device,
                    partial(prepare, config, args.batch_size, device),
                    args.steps,
                    {} if spins == DEFAULT else {"GOMP_SPINCOUNT": spins},
                )
            )
            for work, prepare in works.items()
            for spins in args.spins
        }
        for neighbours in (0, args.neighbours):
            with busy(neighbours):
                runs = take_turns(sides, args.repeats)
            print(f"\nbeside {neighbours} busy processes" if neighbours else "\non the idle machine")
            rows = [
                [
                    f"{work}, {spins}",
                    f"{args.batch_size / median_seconds(turns):.1f}",
                    ratio(runs[work, args.spins[0]], turns),
                ]
                for (work, spins), turns in runs.items()
            ]
            print_table(["", "images a second", f"times as fast as with {args.spins[0]}"], rows)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="phantom", help="whose networks are timed: brats (the paper's) or phantom (the demo's)")
    add("--repeats", type=int, default=5, help="turns of each side that the medians are taken over")
    add("--batch_size", type=int, default=4, help="slices of a training step and of a network pass")
    add("--steps", type=int, default=20, help="training steps, and network passes, of a turn")
    add("--neighbours", type=int, default=2, help="busy processes beside")
    add("--spins", nargs="+", default=[DEFAULT, SPINS], help="values of GOMP_SPINCOUNT; the first is compared with")
    args = parser.parse_args()
    check_at_least_one(args, "repeats", "batch_size", "steps", "neighbours")
    return args


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Processes that multiply matrices as long as the block runs."""
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
    """Multiply matrices, without end."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        torch.mm(a, a)


if __name__ == "__main__":
    run(main)
