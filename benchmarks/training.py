"""Time a training step of the masked diffusion beside the plain version in benchmarks/shared/reference.py.

Slices are synthetic and in memory, so reading from disk is not included.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.script import create_parser, require_at_least
from benchmarks.shared.timing import compare_sides, count_calls, load_config
from benchmarks.shared.work import Work, create_problem, prepare_optimised_step, untrained_network
from utils.cli import run


def main() -> None:
    args = parse_args()
    config, device = load_config(args)
    config.score_model.training.batch_size = args.batch_size
    print(f"\nA training step, batch {args.batch_size}, dropout {config.score_model.model.dropout}")
    sides = {"plain": prepare_plain_step, "optimised": prepare_optimised_step}
    compare_sides(sides, args, config, device, training=True)
    print_calls(config)


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__, gpu_id="0", dataset="brats", repeats=5, batch_size=(8, "samples of a step"))
    return require_at_least(parser.parse_args(), repeats=1, batch_size=1)


def prepare_plain_step(config: Any, batch_size: int, device: Any) -> Work:
    """Return a function that does one step of the reference."""
    import copy
    from itertools import count

    from benchmarks.shared.reference import plain_network, plain_optimizer, plain_training_step

    training = config.score_model.training
    model = plain_network(untrained_network("diffusion", config)).to(device).train()
    ema_model = copy.deepcopy(model).requires_grad_(False)
    optimizer = plain_optimizer(model, training.lr, training.weight_decay)
    losses, inputs_of = create_problem(config, batch_size, device)

    steps = count()

    def work() -> Any:
        step = next(steps)
        return plain_training_step(model, ema_model, optimizer, losses, inputs_of(step), step, training.ema_rate)

    return work


def print_calls(config: Any) -> None:
    """Print the operations of a step in bfloat16 that launch kernels: with autocast, and with bfloat16 weights."""
    from unittest.mock import patch

    import torch

    from utils import recording

    config = config.copy_and_resolve_references()
    config.precision, config.score_model.training.batch_size = "bfloat16", 1
    device = torch.device("cpu")
    autocast = prepare_optimised_step(config, 1, device)
    # As on a GPU, but without graphs.
    with (
        patch.object(recording, "available", lambda device: True),
        patch.object(recording, "Recorded", lambda work, name, report: work),
    ):
        weights = prepare_optimised_step(config, 1, device)
    calls = []
    for step in (autocast, weights):
        step()  # the first one also copies schedules
        calls.append(count_calls(step))
    print(f"ATen calls of a step, counted on the CPU: {calls[0]:,} with autocast, {calls[1]:,} with bfloat16 weights")


if __name__ == "__main__":
    run(main)
