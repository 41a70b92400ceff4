"""Time MMCCD's scoring beside the plain version in benchmarks/shared/reference.py: a network pass, a slice, the memory.

Networks are untrained and slices synthetic, neither of which changes the amount of computation.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import timing
from benchmarks.shared.script import create_parser, print_table, require_at_least
from benchmarks.shared.sweep import Sweep, prepare_optimised_score, synthetic_slices, whole_sweep
from benchmarks.shared.work import Work, network_inputs, prepare_optimised_pass, untrained_network
from utils.cli import run

# Where a whole slice takes too long, only a part is timed: this many DDIM steps, and on the plain side this many bands.
PART_STEPS, PLAIN_BANDS = 9, 1


def main() -> None:
    args = parse_args()
    config, device = timing.load_config(args)
    print(f"\nA network pass, batch {args.batch_size}")
    sides = {"plain": prepare_plain_pass, "optimised": prepare_optimised_pass}
    timing.compare_sides(sides, args, config, device, training=False)
    compare_slices(args, config, device)


def parse_args() -> argparse.Namespace:
    parser = create_parser(
        __doc__,
        gpu_id="0",
        dataset="brats",
        repeats=5,
        batch_size=(8, "samples of the network pass"),
        plain_slices=(32, "slices that the plain side takes through a band together, as the published code does"),
        slices=(139, "slices of the test set that a GPU is timed on"),
    )
    return require_at_least(parser.parse_args(), repeats=1, batch_size=1, plain_slices=1, slices=1)


def prepare_plain_pass(config: Any, batch_size: int, device: Any) -> Work:
    """Return a pass of the masked conditional UNet as published."""
    import torch

    from benchmarks.shared.reference import plain_network

    network = plain_network(untrained_network("diffusion", config).eval()).to(device)
    inputs = network_inputs(config, batch_size, device)
    return torch.no_grad()(lambda: network(*inputs))


# ----------------------------------------------------------------------------------------------------------
# Slices


def compare_slices(args: argparse.Namespace, config: Any, device: Any) -> None:
    """Print the seconds a slice, plain and in both presets; on a GPU also those of a whole test set."""
    on_gpu = device.type == "cuda"
    batch_size = config.score_model.sampling.batch_size
    paper, fast = (whole_sweep(config, preset) for preset in ("paper", "fast"))
    whole = {"plain": paper, "paper": paper, "fast": fast}
    part = paper if on_gpu else part_of(paper, batch_size)
    timed = {"plain": part_of(paper, PLAIN_BANDS), "paper": part, "fast": fast}
    n_slices = args.slices if on_gpu else 1
    sides = {side: partial(prepare_optimised_score, sweep, device, n_slices) for side, sweep in timed.items()}
    sides["plain"] = partial(prepare_plain_score, timed["plain"], device, args.plain_slices)
    with timing.start_workers(device, sides) as workers:
        runs = timing.take_turns(workers, args.repeats)
        test_set = {side: workers[side](args.slices) for side in ("paper", "fast")} if on_gpu else {}

    scale = {side: whole[side].passes / timed[side].passes for side in whole}
    scale["plain"] /= args.plain_slices
    rows = []
    for side, turns in runs.items():
        together = args.plain_slices if side == "plain" else 1
        sizes = len(whole[side].bands), whole[side].steps, whole[side].passes, timed[side].passes * together
        batch = args.plain_slices if side == "plain" else min(batch_size, len(timed[side].bands))
        seconds = f"{scale[side] * timing.median_seconds(turns):.2f}"
        rows.append([side, *(f"{size:,}" for size in sizes), str(batch), seconds, timing.peak_memory(turns)])
    print("\nA slice: a sample is one hidden band, and takes its steps forward and 1 pass backward")
    print_table(["", "bands", "steps", "passes", "timed", "batch", "seconds", "peak memory"], rows)
    for side in ("paper", "fast"):
        print(f"plain / {side}: {timing.ratio(runs['plain'], runs[side], scale['plain'] / scale[side])}")
    parts = " and of ".join(side for side in whole if scale[side] > 1)
    print(
        f"Only a part of {parts} was timed, {PART_STEPS} steps of some bands: the seconds are scaled to all passes,\n"
        "the peak memory is not."
    )
    for side, turn in test_set.items():
        print(
            f"{args.slices} slices, {side}: {turn.seconds:.1f} s for {args.slices * whole[side].passes:,} passes "
            f"(the very first slice, with compiling, took {workers[side].first.seconds:.1f} s)"
        )


def part_of(whole: Sweep, n_bands: int) -> Sweep:
    """Return a sweep with the first `n_bands` bands and `PART_STEPS` steps."""
    config = whole.config.copy_and_resolve_references()
    config.score_model.sampling.timestep_respacing = str(PART_STEPS)
    return Sweep(config, whole.bands[:n_bands], PART_STEPS)


def prepare_plain_score(sweep: Sweep, device: Any, n_slices: int = 1) -> Work:
    """Return a function that scores `n_slices` slices together by the reference."""
    from benchmarks.shared.reference import plain_mmccd, plain_network
    from models import load_method

    forward, backward = (
        plain_network(untrained_network(name, sweep.config).eval()).to(device) for name in ("diffusion", "unet")
    )
    translator = load_method("diffusion").create_translator(forward, sweep.config)
    image, brainmask = (tensor.to(device) for tensor in synthetic_slices(n_slices, sweep.config.data.image_size))
    return lambda: plain_mmccd(image, brainmask, translator, backward, sweep.bands)


if __name__ == "__main__":
    run(main)
