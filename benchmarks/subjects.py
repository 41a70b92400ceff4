"""Time and memory of scoring whole scans, as the number of subjects grows.

    python benchmarks/subjects.py --subjects 8 32 139

Writes error maps of smooth noise in brains with a lesion, half of the subjects healthy, and scores them again with
modality_cyclic_test.py --rescore: the choice of a score on validation slices, all metrics, figures and tables.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.plan import REPOSITORY
from benchmarks.shared.script import create_parser, print_table, require_at_least
from utils.cli import UserError, run

SCRIPT = REPOSITORY / "modality_cyclic_test.py"


def main() -> None:
    args = parse_args()
    rows = []
    for n_subjects in args.subjects:
        with TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            write_cohort(folder / "error_maps.npz", n_subjects, args)
            size = (folder / "error_maps.npz").stat().st_size
            seconds, peak = rescore(folder)
        n_maps = n_subjects * args.slices
        times = [f"{seconds:,.0f}", f"{1000 * seconds / n_maps:.1f}"]
        rows.append([f"{n_subjects}", f"{n_maps:,}", f"{size / 2**30:.2f}", *times, f"{peak / 2**30:.2f}"])
        print_table(["subjects", "maps", "file, GiB", "seconds", "ms a map", "peak memory, GiB"], rows)


def parse_args() -> argparse.Namespace:
    parser = create_parser(
        __doc__,
        subjects=([8, 32, 139], "numbers of test subjects"),
        val=(8, "validation subjects; 0: no score is chosen, and only the oracle threshold is evaluated"),
        slices=(155, "slices of a subject"),
        image_size=(128, "height and width of a slice in px"),
        folder=(Path(), "folder for temporary files; an error map of 128 px takes up to 0.4 MB"),
    )
    return require_at_least(parser.parse_args(), val=0, slices=1, image_size=32)


def write_cohort(path: Path, n_subjects: int, args: argparse.Namespace) -> None:
    """Write error maps of `n_subjects` test subjects and of the validation subjects."""
    from tqdm import tqdm

    from evaluation.results import MapWriter

    writer = MapWriter(path)
    for split, n in (("val", args.val), ("test", n_subjects)):
        for subject in tqdm(range(n), desc=f"writing {split}", unit="subject", leave=False):
            writer.add(split, create_subject(f"{split}{subject:04d}", subject, args.slices, args.image_size))
    sampling = {"smooth": "none"}
    modalities = {"input": "flair", "trans": "t2", "image_size": args.image_size, "voxel_size": [1.0, 1.875, 1.875]}
    run = {"method": "cyclic_unet", "score": "errors", "usual_error": 1.0, "sampling_settings": sampling}
    writer.close(run | modalities | {"checkpoints": {}, "trained_steps": {"forward": 1, "backward": 1}})


def create_subject(name: str, seed: int, n_slices: int, size: int) -> dict:
    """Return the error maps of one subject: an ellipsoid brain with a lesion, unless the seed is odd."""
    import numpy as np
    from scipy.ndimage import uniform_filter

    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[-1 : 1 : n_slices * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    brainmask = z**2 + (y / 0.8) ** 2 + (x / 0.65) ** 2 < 1
    centre = rng.uniform(-0.3, 0.3, 3)
    distance = sum((axis - at) ** 2 for axis, at in zip((z, y, x), centre, strict=True))
    truth = (distance < rng.uniform(0.15, 0.3) ** 2) & (seed % 2 == 0)
    noise = rng.standard_normal((2, *truth.shape), dtype=np.float32)
    image = 3 * uniform_filter(noise[0], (3, 5, 5)) + truth
    reconstruction = image - uniform_filter(noise[1], 3) - 0.7 * truth
    return {
        "names": np.array([f"{name}_{i}" for i in range(n_slices)]),
        "image": image,
        "translation": reconstruction,
        "reconstruction": reconstruction,
        "variance": np.zeros_like(image),
        "scores": (image - reconstruction) ** 2,
        "truth": truth,
        "brainmask": brainmask,
    }


def rescore(folder: Path) -> tuple[float, int]:
    """Score error maps in a process of its own; return the seconds it took and its peak memory in bytes.

    Raises:
        UserError: if it fails.
    """
    start = perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPT, "--rescore", folder], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("scoring failed, for the reason given above")
    return perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    run(main)
