"""How well one modality predicts another in healthy brain: the phantom, or any cohort in BraTS layout, beside patients.

    python benchmarks/phantom_fidelity.py datasets/phantom_raw

A cycle is easy if each of two modalities is a function of the other. On the tumour-free slices of [70, 90) of each
subject: R2(b|a) is the share of the variance of b that the mean of b at each intensity of a explains; correlations and
standard deviations are those of a band below 1.5 px (fine) and of one from 1.5 to 6 px (mid), within the brain.
"""

import argparse
import sys
from itertools import combinations, permutations
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.script import create_parser, print_table, with_range
from utils.cli import UserError, run

MODALITIES = ("flair", "t2", "t1", "t1ce")
SLICES = slice(70, 90)
MIN_BRAIN = 3000  # px of brain that a slice needs
BINS = 60  # quantile bins of the explained variance

# Four patients of BraTS: mean, lowest and highest of each statistic.
# fmt: off
PATIENTS = {
    "R2(t2|flair)": (0.20, 0.05, 0.31), "R2(t1|flair)": (0.43, 0.16, 0.57), "R2(t1ce|flair)": (0.15, 0.03, 0.34),
    "R2(flair|t2)": (0.42, 0.33, 0.47), "R2(t1|t2)": (0.37, 0.27, 0.48), "R2(t1ce|t2)": (0.15, 0.04, 0.22),
    "R2(flair|t1)": (0.50, 0.21, 0.62), "R2(t2|t1)": (0.33, 0.24, 0.39), "R2(t1ce|t1)": (0.29, 0.05, 0.75),
    "R2(flair|t1ce)": (0.35, 0.20, 0.45), "R2(t2|t1ce)": (0.26, 0.04, 0.40), "R2(t1|t1ce)": (0.47, 0.30, 0.78),
    "corr fine flair, t2": (-0.37, -0.46, -0.27), "corr mid flair, t2": (-0.50, -0.73, -0.28),
    "corr fine flair, t1": (0.44, 0.35, 0.56), "corr mid flair, t1": (0.58, 0.31, 0.80),
    "corr fine flair, t1ce": (0.07, -0.24, 0.33), "corr mid flair, t1ce": (0.18, -0.11, 0.56),
    "corr fine t2, t1": (-0.48, -0.74, -0.26), "corr mid t2, t1": (-0.68, -0.90, -0.32),
    "corr fine t2, t1ce": (-0.33, -0.51, -0.10), "corr mid t2, t1ce": (-0.59, -0.81, -0.31),
    "corr fine t1, t1ce": (0.21, -0.21, 0.61), "corr mid t1, t1ce": (0.38, -0.26, 0.87),
    "sd fine flair": (0.56, 0.47, 0.65), "sd mid flair": (0.62, 0.50, 0.75), "sd flair": (1.49, 1.33, 1.60),
    "sd fine t2": (0.82, 0.68, 0.98), "sd mid t2": (1.05, 0.83, 1.44), "sd t2": (2.29, 1.59, 2.91),
    "sd fine t1": (0.37, 0.31, 0.46), "sd mid t1": (0.62, 0.55, 0.82), "sd t1": (1.56, 1.27, 1.82),
    "sd fine t1ce": (0.57, 0.46, 0.66), "sd mid t1ce": (0.62, 0.39, 0.81), "sd t1ce": (1.66, 1.11, 2.06),
}
# fmt: on


def main() -> None:
    args = parse_args()

    from tqdm import tqdm

    from datasets.cohorts import read_brats

    subjects = list(read_brats(args.cohort).subjects.values())[: args.subjects]
    found = {subject.name: statistics(subject) for subject in tqdm(subjects, desc="measuring", unit="subject")}
    measured = [one for one in found.values() if one]
    if left_out := [name for name, one in found.items() if not one]:
        print(f"left out, no tumour-free slice in {SLICES.start} … {SLICES.stop - 1}: {', '.join(left_out)}")
    if not measured:
        raise UserError(f"no subject of {args.cohort} has a tumour-free slice: name another cohort")
    show(measured)


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__, subjects=(24, "number of subjects to measure, the first ones by name"))
    parser.add_argument("cohort", type=Path, help="folder of raw volumes in BraTS layout, with all four modalities")
    return parser.parse_args()


def statistics(subject) -> dict[str, float] | None:
    """Return the statistics in PATIENTS of one subject's healthy slices; None if it has none."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    from datasets.records import NORMALISATION
    from datasets.subject import normalise
    from utils.nifti import read_volume

    volumes = {modality: read_volume(subject.volumes[modality])[0] for modality in MODALITIES}
    tumour = read_volume(subject.volumes["seg"])[0][:, :, SLICES] > 0
    brain = np.all([volume[:, :, SLICES] != 0 for volume in volumes.values()], axis=0)
    chosen = ~tumour.any(axis=(0, 1)) & (brain.sum(axis=(0, 1)) > MIN_BRAIN)
    if not chosen.any():
        return None
    images = {key: normalise(volume, **NORMALISATION)[:, :, SLICES][:, :, chosen] for key, volume in volumes.items()}
    brain = brain[:, :, chosen]

    def smooth(image, sigma: float):
        return gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))

    inner = smooth(brain, 4) > 0.98  # where no filter reaches the edge of the brain
    blurred = {key: smooth(image, 1.5) for key, image in images.items()}
    bands = {
        "fine": {key: (image - blurred[key])[inner] for key, image in images.items()},
        "mid": {key: (blurred[key] - smooth(image, 6))[inner] for key, image in images.items()},
    }
    found = {f"R2({b}|{a})": explained(images[a][brain], images[b][brain]) for a, b in permutations(MODALITIES, 2)}
    for name, band in bands.items():
        for a, b in combinations(MODALITIES, 2):
            found[f"corr {name} {a}, {b}"] = float(np.corrcoef(band[a], band[b])[0, 1])
        found |= {f"sd {name} {key}": float(values.std()) for key, values in band.items()}
    return found | {f"sd {key}": float(image[brain].std()) for key, image in images.items()}


def explained(a, b) -> float:
    """Return the share, in 0 … 1, of the variance of b [M] that its mean in each quantile bin of a [M] explains."""
    import numpy as np

    bins = np.digitize(a, np.quantile(a, np.linspace(0, 1, BINS + 1)[1:-1]))
    counts, sums = (np.bincount(bins, weights, minlength=BINS) for weights in (None, b))
    means = (sums / np.maximum(counts, 1))[bins]
    return float(means.var() / b.var())


def show(measured: list[dict[str, float]]) -> None:
    """Print every statistic beside the patients', and mark means outside the allowed range."""
    lines = []
    for name, (patients, low, high) in PATIENTS.items():
        values = [found[name] for found in measured]
        least, most = (0.8 * patients, 1.2 * patients) if name.startswith("sd") else (low, high)
        mark = "" if least <= mean(values) <= most else "outside"
        lines.append((name, with_range(values), f"{patients:.2f} ({low:.2f} … {high:.2f})", mark))
    print_table([f"{len(measured)} subjects", "mean (lowest … highest)", "four patients", ""], lines)
    print("outside: not in the patients' range; standard deviations: more than 20 % from the patients' mean")


if __name__ == "__main__":
    run(main)
