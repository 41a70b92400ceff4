"""Time the exact search for ⌈Dice⌉ beside a plain evaluation of evenly spaced thresholds.

Both search for the threshold with the highest mean Dice over the slices of a synthetic test set: anomaly maps of smooth
noise in a brain, brighter in irregular lesions whose contrast varies from none to obvious.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from timeit import timeit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.script import create_parser, print_table, require_at_least
from benchmarks.shared.timing import Run, median_seconds, ratio, take_turns
from utils.cli import run


def main() -> None:
    args = parse_args()

    from evaluation.metrics import best_threshold, mask_scores

    truth, brainmask, scores = synthetic_test_set(args.slices, args.image_size, args.seed)
    scores = mask_scores(scores, brainmask)
    tried = {"exact sweep": len(np.unique(scores[scores > -np.inf])), "plain numpy": args.thresholds}
    searches = {
        "exact sweep": partial(best_threshold, scores, truth),
        "plain numpy": partial(best_of_evenly_spaced, scores, truth, args.thresholds),
    }
    turns = {side: lambda search=search: Run(timeit(search, number=1)) for side, search in searches.items()}
    runs = take_turns(turns, args.repeats)
    print(f"{args.slices} slices of {args.image_size}x{args.image_size} px, median of {args.repeats} repeats")
    rows = []
    for side, search in searches.items():
        threshold, dice = search()
        rows.append([side, str(tried[side]), f"{median_seconds(runs[side]):.3f}", f"{dice:.6f}", f"{threshold:.6f}"])
    print_table(["", "thresholds", "seconds", "mean Dice", "threshold"], rows)
    slower = ratio(runs["plain numpy"], runs["exact sweep"])
    print(f"plain / exact: {slower} (the exact sweep tries all distinct scores)")


def parse_args() -> argparse.Namespace:
    parser = create_parser(
        __doc__,
        slices=(139, "slices of the test set"),
        image_size=(128, "height and width of a slice in px"),
        thresholds=(100, "thresholds of the plain evaluation"),
        repeats=5,
        seed=(0, "seed of the test set"),
    )
    return require_at_least(parser.parse_args(), slices=1, image_size=16, thresholds=1, repeats=1, seed=0)


def best_of_evenly_spaced(scores: np.ndarray, truth: np.ndarray, n_thresholds: int) -> tuple[float, float]:
    """Return the best of `n_thresholds` between the lowest and the highest score, and its mean Dice."""
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
    """Return truth and brain mask, bool, and anomaly maps, float32 and at least 0: [N, size, size] each."""
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


if __name__ == "__main__":
    run(main)
