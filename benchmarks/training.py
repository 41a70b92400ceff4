"""Time a training step of the masked diffusion beside the plain way of benchmarks/shared/reference.py.

Slices are synthetic and in memory: what reading them from disk takes is no part of it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import (
    Work,
    add_flags,
    check_at_least_one,
    compare_sides,
    describe,
    random_images,
    untrained_network,
)
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


def prepare_optimised_step(config: Any, batch_size: int, device: Any) -> Work:
    """Steps of the training loop as modality_cyclic_train.py sets it up, one for each call."""
    from itertools import repeat

    from guided_diffusion.train_util import TrainLoop
    from utils.device import pick_precision, speed_up

    training = config.score_model.training
    batch, compute_losses = create_problem(config, batch_size, device)
    loop = TrainLoop(
        model=speed_up(untrained_network("diffusion", config), device, training=True),
        compute_losses=compute_losses,
        batches_from=lambda step: repeat(batch),
        directory=Path(),
        logger=None,  # single steps neither log nor save nor resume
        settings=training,
        precision=pick_precision(config.precision, device),
        seed=config.seed,
        on_save=lambda network, step: None,
    )
    loop.model.train()
    return lambda: loop._train_step(batch)


def create_problem(config: Any, batch_size: int, device: Any) -> tuple:
    """A batch of two modalities, and what training minimises on it: losses of (model, batch, step)."""
    from models.build import create_losses

    losses, _ = create_losses("diffusion", config, device)
    return random_images(2, batch_size, config), lambda model, batch, step: losses(
        model, *batch.to(device, non_blocking=True), step
    )


if __name__ == "__main__":
    run(main)
