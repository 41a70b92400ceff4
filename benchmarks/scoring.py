"""Time MMCCD's scoring beside the plain way of benchmarks/shared/reference.py: a network pass, a slice, the memory.

Networks are untrained, the slices synthetic: neither changes what is computed.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import (
    Worker,
    add_flags,
    check_at_least_one,
    compare_sides,
    describe,
    median_seconds,
    peak_memory,
    print_table,
    ratio,
    take_turns,
)
from benchmarks.shared.work import Work, network_inputs, prepare_optimised_pass, untrained_network
from utils.cli import ArgumentParser, run

# Where a whole slice takes too long, a part of it is timed: so many DDIM steps, and of the plain side so many bands.
PART_STEPS, PLAIN_BANDS = 9, 1
# That many slices go through a band together in the published code, which a GPU needs and two cores do not mind.
PLAIN_SLICES = 32


def main() -> None:
    args = parse_args()

    import config as configs
    from utils.device import pick_device

    config = configs.get_config(args.dataset)
    device = pick_device(args.gpu_id)
    print(f"{args.dataset}, {config.data.image_size} px, on {describe(device)}; medians of {args.repeats} turns")
    compare_network_passes(args, config, device)
    compare_slices(args, config, device)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="samples of the network pass")
    together = "slices that go through a band together on the plain side"
    parser.add_argument("--plain_slices", type=int, default=PLAIN_SLICES, help=together)
    parser.add_argument("--slices", type=int, default=139, help="slices of the test set that a GPU is timed on")
    args = parser.parse_args()
    check_at_least_one(args, "repeats", "batch_size", "plain_slices", "slices")
    return args


# ----------------------------------------------------------------------------------------------------------
# One network pass


def compare_network_passes(args: argparse.Namespace, config: Any, device: Any) -> None:
    """Print the seconds of both sides, and how near to the device's peak they come."""
    print(f"\nA network pass, batch {args.batch_size}")
    sides = {"plain": prepare_plain_pass, "optimised": prepare_optimised_pass}
    compare_sides(sides, args, config, device, training=False)


def prepare_plain_pass(config: Any, batch_size: int, device: Any) -> Work:
    """The masked conditional UNet as published."""
    import torch

    from benchmarks.shared.reference import plain_network

    network = plain_network(untrained_network("diffusion", config).eval()).to(device)
    inputs = network_inputs(config, batch_size, device)

    @torch.no_grad()
    def work() -> Any:
        return network(*inputs)

    return work


# ----------------------------------------------------------------------------------------------------------
# Slices


class Sweep(NamedTuple):
    """How a slice is scored: the config, the bands that hide some brain, and the DDIM steps for each of them."""

    config: Any
    bands: Sequence[Any]
    steps: int

    @property
    def passes(self) -> int:
        """Network passes: a sample costs its steps forward and one pass backward."""
        return len(self.bands) * (self.steps + 1)


def compare_slices(args: argparse.Namespace, config: Any, device: Any) -> None:
    """Print the seconds a slice, plain and in both presets; on a GPU also those of a whole test set."""
    on_gpu = device.type == "cuda"
    batch_size = config.score_model.sampling.batch_size
    paper, fast = (whole_sweep(config, preset) for preset in ("paper", "fast"))
    whole = {"plain": paper, "paper": paper, "fast": fast}
    timed = {
        "plain": part_of(paper, PLAIN_BANDS),
        "paper": paper if on_gpu else part_of(paper, batch_size),
        "fast": fast,
    }
    with ExitStack() as stack:
        workers = {}
        for side, sweep in timed.items():
            prepare = partial(prepare_plain_score, sweep, device, args.plain_slices)
            if side != "plain":
                prepare = partial(prepare_optimised_score, sweep, device, args.slices if on_gpu else 1)
            workers[side] = stack.enter_context(Worker(device, prepare))
        runs = take_turns(workers, args.repeats)
        test_set = {side: workers[side].run(args.slices) for side in ("paper", "fast")} if on_gpu else {}

    scale = {side: whole[side].passes / timed[side].passes for side in whole}
    scale["plain"] /= args.plain_slices
    rows = [
        [
            side,
            str(len(whole[side].bands)),
            str(whole[side].steps),
            f"{whole[side].passes:,}",
            f"{timed[side].passes * (args.plain_slices if side == 'plain' else 1):,}",
            str(args.plain_slices if side == "plain" else min(batch_size, len(timed[side].bands))),
            f"{scale[side] * median_seconds(turns):.2f}",
            peak_memory(turns),
        ]
        for side, turns in runs.items()
    ]
    print("\nA slice: a sample is a band hidden, and costs its steps forward and 1 pass backward")
    print_table(["", "bands", "steps", "passes", "timed", "batch", "seconds", "peak memory"], rows)
    for side in ("paper", "fast"):
        print(f"plain / {side}: {ratio(runs['plain'], runs[side], scale['plain'] / scale[side])}")
    parts = " and of ".join(side for side in whole if scale[side] > 1)
    print(
        f"Of {parts} a part was timed, {PART_STEPS} steps of some bands: its seconds are scaled to all passes,\n"
        "its peak memory is not."
    )
    for side, turn in test_set.items():
        print(
            f"{args.slices} slices, {side}: {turn.seconds:.1f} s for {args.slices * whole[side].passes:,} passes "
            f"(the very first slice, with compiling, took {workers[side].first.seconds:.1f} s)"
        )


def whole_sweep(config: Any, preset: str) -> Sweep:
    """How a preset of the config scores the synthetic slice."""
    from models.masks import band_masks, sweep
    from models.sampling import SAMPLING, create_diffusion, sampling_keys

    config = config.copy_and_resolve_references()
    size, width, sampling = config.data.image_size, config.score_model.mask.width, config.score_model.sampling
    config.update_from_flattened_dict(sampling_keys(*SAMPLING[preset], width))
    bands = sweep(size, sampling.stride)
    _, brainmask = synthetic_slices(1, size)
    hides_brain = (band_masks(bands, size, width) & brainmask).flatten(1).any(1).tolist()
    steps = create_diffusion(config.score_model.diffusion, sampling.timestep_respacing).num_timesteps
    return Sweep(config, [band for band, hides in zip(bands, hides_brain, strict=True) if hides], steps)


def part_of(whole: Sweep, n_bands: int) -> Sweep:
    """The same with the first `n_bands` bands and `PART_STEPS` steps."""
    config = whole.config.copy_and_resolve_references()
    config.score_model.sampling.timestep_respacing = str(PART_STEPS)
    return Sweep(config, whole.bands[:n_bands], PART_STEPS)


def prepare_plain_score(sweep: Sweep, device: Any, n_slices: int = 1) -> Work:
    """Slices, scored by the reference, all together."""
    from benchmarks.shared.reference import plain_mmccd, plain_network
    from models import load_method

    forward, backward = (
        plain_network(untrained_network(name, sweep.config).eval()).to(device) for name in ("diffusion", "unet")
    )
    translator = load_method("diffusion").create_translator(forward, sweep.config)
    image, brainmask = (tensor.to(device) for tensor in synthetic_slices(n_slices, sweep.config.data.image_size))
    return lambda: plain_mmccd(image, brainmask, translator, backward, sweep.bands)


def prepare_optimised_score(sweep: Sweep, device: Any, n_slices: int) -> Work:
    """As many of `n_slices` slices as it is told, by default one, scored as modality_cyclic_test.py does."""
    from models import load_method
    from models.mmccd import mmccd
    from utils.device import autocast, compile_if_it_pays, pick_precision, speed_up

    forward, backward = (
        speed_up(untrained_network(name, sweep.config).eval(), device, training=False) for name in ("diffusion", "unet")
    )
    for network in (forward, backward):
        compile_if_it_pays(network, device, n_slices * sweep.passes // sweep.config.score_model.sampling.batch_size)
    translator = load_method("diffusion").create_translator(forward, sweep.config)
    image, brainmask = synthetic_slices(n_slices, sweep.config.data.image_size)
    image = image.to(device)
    precision = pick_precision(sweep.config.precision, device)

    def work(slices: int = 1) -> Any:
        with autocast(device, precision):
            cycle = mmccd(
                image[:slices],
                brainmask[:slices],
                translator,
                backward,
                bands=sweep.bands,
                batch_size=sweep.config.score_model.sampling.batch_size,
            )
        return cycle.error

    return work


def synthetic_slices(n: int, size: int) -> tuple[Any, Any]:
    """Image and brain mask, [n, 1, size, size]: noise in an ellipse as large as a brain is, on a background of −3."""
    import torch

    across = (torch.arange(size) + 0.5) / size - 0.5  # in widths of the image, from its centre
    brain = (across[:, None] / 0.43) ** 2 + (across[None, :] / 0.35) ** 2 < 1
    brainmask = brain.expand(n, 1, size, size)
    noise = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(0))
    return torch.where(brainmask, noise, -3.0), brainmask


if __name__ == "__main__":
    run(main)
