"""Time a training step of the masked diffusion beside the plain way of benchmarks/shared/reference.py.

Slices are synthetic and in memory: what reading them from disk takes is no part of it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import add_flags, check_at_least_one, compare_sides, describe
from benchmarks.shared.work import Work, create_problem, prepare_optimised_step, untrained_network
from utils.cli import ArgumentParser, run


def main() -> None:
    args = parse_args()

    import config as configs
    from utils.device import pick_device

    config = configs.get_config(args.dataset)
    config.score_model.training.batch_size = args.batch_size
    device = pick_device(args.gpu_id)
    print(f"{args.dataset}, {config.data.image_size} px, on {describe(device)}; medians of {args.repeats} turns")
    print(f"\nA training step, batch {args.batch_size}, dropout {config.score_model.model.dropout}")
    sides = {"plain": prepare_plain_step, "optimised": prepare_optimised_step}
    compare_sides(sides, args, config, device, training=True)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="samples of a step")
    args = parser.parse_args()
    check_at_least_one(args, "repeats", "batch_size")
    return args


def prepare_plain_step(config: Any, batch_size: int, device: Any) -> Work:
    """Steps of the reference, one for each call."""
    import copy
    from itertools import count

    from benchmarks.shared.reference import plain_network, plain_optimizer, plain_training_step

    training = config.score_model.training
    model = plain_network(untrained_network("diffusion", config)).to(device).train()
    ema_model = copy.deepcopy(model).requires_grad_(False)
    optimizer = plain_optimizer(model, training.lr, training.weight_decay)
    batch, compute_losses = create_problem(config, batch_size, device)
    steps = count()
    return lambda: plain_training_step(
        model, ema_model, optimizer, compute_losses, batch, next(steps), training.ema_rate
    )


if __name__ == "__main__":
    run(main)
