"""Time the exact search for ⌈Dice⌉ beside a plain evaluation of evenly spaced thresholds.

Both look for the one threshold with the highest mean Dice over the slices of a synthetic test set: anomaly maps
of smooth noise in a brain, brighter on lesions of irregular shape and of every strength, hidden to obvious.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, UserError, run

Result = TypeVar("Result")


def main() -> None:
    args = parse_args()

    from evaluation.metrics import best_threshold, cut_scores

    truth, brainmask, scores = synthetic_test_set(args.slices, args.image_size, args.seed)
    scores = cut_scores(scores, brainmask)
    n_distinct = len(np.unique(scores[scores > -np.inf]))
    exact_s, (exact_threshold, exact_dice) = median_time(lambda: best_threshold(scores, truth), args.repeats)
    plain_s, (plain_threshold, plain_dice) = median_time(
        lambda: best_of_evenly_spaced(scores, truth, args.thresholds), args.repeats
    )

    print(f"{args.slices} slices of {args.image_size}x{args.image_size} px, median of {args.repeats} repeats")
    print(f"{'':12s} {'thresholds':>10s} {'seconds':>8s} {'mean Dice':>10s} {'threshold':>10s}")
    for name, tried, seconds, dice, threshold in [
        ("exact sweep", n_distinct, exact_s, exact_dice, exact_threshold),
        ("plain numpy", args.thresholds, plain_s, plain_dice, plain_threshold),
    ]:
        print(f"{name:12s} {tried:10d} {seconds:8.3f} {dice:10.6f} {threshold:10.6f}")
    print(f"plain / exact: {plain_s / exact_s:.2f} (the exact sweep tries all distinct scores)")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=139, help="slices of the test set")
    parser.add_argument("--image_size", type=int, default=128, help="height and width of a slice in px")
    parser.add_argument("--thresholds", type=int, default=100, help="thresholds of the plain evaluation")
    parser.add_argument("--repeats", type=int, default=5, help="repeats that the median is taken over")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test set")
    args = parser.parse_args()
    for flag, least in [("slices", 1), ("image_size", 16), ("thresholds", 1), ("repeats", 1), ("seed", 0)]:
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    return args


def best_of_evenly_spaced(scores: np.ndarray, truth: np.ndarray, n_thresholds: int) -> tuple[float, float]:
    """The best of `n_thresholds` between the lowest and the highest score, one after another, all slices at once."""
    finite = scores[np.isfinite(scores)]
    lesion = truth.sum(axis=(1, 2))
    best = (float("nan"), -1.0)
    for threshold in np.linspace(finite.min(), finite.max(), n_thresholds):
        prediction = scores >= threshold
        hits = (prediction & truth).sum(axis=(1, 2))
        mean_dice = np.mean(2 * hits / (prediction.sum(axis=(1, 2)) + lesion))
        if mean_dice > best[1]:
            best = (float(threshold), float(mean_dice))
    return best


def synthetic_test_set(n_slices: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth and brain mask, [N, size, size] bool, and anomaly maps, [N, size, size] float32, of 0 and above."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5  # in widths of the image, from its centre
    brain = (y / 0.44) ** 2 + (x / 0.35) ** 2 < 1
    noise = gaussian_filter(rng.normal(size=(2, n_slices, size, size)), (0, 0, size / 64, size / 64))
    noise /= noise.std()
    centre, radius = rng.uniform(-0.2, 0.2, (2, n_slices, 1, 1)), rng.uniform(0.04, 0.14, (n_slices, 1, 1))
    distance = np.hypot(y - centre[0], x - centre[1])
    truth = (distance < radius * (1 + 0.2 * noise[0])) & brain
    contrast = rng.uniform(0, 4, (n_slices, 1, 1))
    scores = (noise[1] + contrast * truth) ** 2
    return truth, np.broadcast_to(brain, truth.shape), scores.astype(np.float32)


def median_time(function: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median seconds of `repeats` calls, and what the function returns."""
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        result = function()
        seconds.append(perf_counter() - start)
    return median(seconds), result


if __name__ == "__main__":
    run(main)
