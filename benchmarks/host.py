"""What the host does in a training step and in a sampling step besides the network, as a share of a GPU's time.

    python benchmarks/host.py --tflops 400

The network is replaced by the identity, with as many parameters as a real one, all of them small, as the slices are:
what is left is calling the operations, which a GPU's host does as well. The draws of a step are timed at their real
size. On a GPU a second thread makes those of the next step.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import check_at_least_one, print_table
from benchmarks.shared.work import count_flops, training_steps
from utils.cli import ArgumentParser, run

WARM_UP = 3  # steps
SMALL = 16  # px, of slices that take no time to compute with


def main() -> None:
    args = parse_args()

    import torch

    import config as configs
    from models.sampling import SAMPLING, sampling_keys

    torch.set_num_threads(1)
    config = configs.get_config(args.dataset)
    config.precision = "float32"
    config.score_model.training.batch_size = config.score_model.sampling.batch_size = args.batch_size
    per_pass, per_step = (
        args.batch_size * count_flops(config, training=training) / args.tflops / 1e9 for training in (False, True)
    )
    small = config.copy_and_resolve_references()
    small.data.image_size, small.score_model.mask.width = SMALL, 2
    small.score_model.model.model_channels = small.score_model.model.norm_groups
    draws, small_draws = (milliseconds(training_draws(one), args.repeats) for one in (config, small))
    train = training_steps(identity(small), small, args.batch_size, torch.device("cpu"))
    step = milliseconds(train, args.repeats) - small_draws
    rows = [["training", f"{step:.2f}", f"{draws:.2f}", f"{per_step:.2f}", f"{step / per_step:.0%}"]]
    for preset, (steps, *how) in SAMPLING.items():
        small.update_from_flattened_dict(sampling_keys(steps, *how, small.score_model.mask.width))
        n_steps, sample = sampling_steps(small)
        step = milliseconds(sample, args.repeats) / n_steps
        rows.append([f"sampling, {preset}", f"{step:.2f}", "", f"{per_pass:.2f}", f"{step / per_pass:.0%}"])
    print(f"{args.dataset}, {config.data.image_size} px, batch {args.batch_size}; medians of {args.repeats} steps")
    print_table(["a step", "host, ms", "draws, ms", f"network at {args.tflops:g} TFLOP/s, ms", "host / network"], rows)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="brats", help="whose networks are meant: brats (the paper's) or phantom (the demo's)")
    add("--batch_size", type=int, default=32, help="slices of a step")
    add("--repeats", type=int, default=50, help="steps that the medians are taken over")
    add("--tflops", type=float, default=400.0, help="TFLOP/s that a GPU reaches in the network")
    args = parser.parse_args()
    check_at_least_one(args, "batch_size", "repeats", "tflops")
    return args


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """The CPU time of this thread that a step takes, the median."""
    times = []
    for _ in range(WARM_UP + repeats):
        started = thread_time()
        step()
        times.append(thread_time() - started)
    return 1000 * median(times[WARM_UP:])


def identity(config: Any) -> Any:
    """A network that only hands on what it is given, scaled by 1, and has all parameters of a real one."""
    from torch import nn, ones

    from models import load_method

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.scale = (
                load_method("diffusion").create_network(config.score_model),
                nn.Parameter(ones(())),
            )

        def forward(self, x: Any, t: Any, condition: Any) -> Any:
            return self.scale * x

    return Identity()


def training_draws(config: Any) -> Callable[[], object]:
    """What is random in a training step of MMCCD's forward translator."""
    from itertools import count

    from guided_diffusion.resample import ScheduleSampler
    from models.masked_diffusion import draw_masked_diffusion
    from models.sampling import create_diffusion

    mask, steps = config.score_model.mask, count()
    sampler = ScheduleSampler(create_diffusion(config.score_model.diffusion))
    where = {"image_size": config.data.image_size, "band_width": mask.width, "band_stride": mask.stride}
    batch_size = config.score_model.training.batch_size
    return lambda: draw_masked_diffusion(next(steps), seed=0, batch_size=batch_size, **where, schedule_sampler=sampler)


def sampling_steps(config: Any) -> tuple[int, Callable[[], object]]:
    """How many steps a batch of samples takes, and what takes them."""
    import torch

    from models import load_method
    from models.masks import sweep

    batch_size, size = config.score_model.sampling.batch_size, config.data.image_size
    translator = load_method("diffusion").create_translator(identity(config), config)
    image = torch.zeros(batch_size, 1, size, size)
    bands = (sweep(size, config.score_model.sampling.stride) * batch_size)[:batch_size]
    return translator.diffusion.num_timesteps, lambda: translator.sample(image, bands)


if __name__ == "__main__":
    run(main)
