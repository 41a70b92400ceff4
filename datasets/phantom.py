"""Make a phantom cohort: synthetic brain MRI in BraTS 2021 format, for demos and tests without patient data.

The anatomy is real, the subjects are not: nilearn's MNI152 tissue templates are deformed at random for each subject
(phantom_anatomy), a tumour is grown in the white matter (phantom_tumour), and each modality is simulated with its own
contrast and acquisition (phantom_scan). `--healthy` adds subjects without a tumour. Everything is drawn from (seed,
subject number), so a cohort is identical byte for byte with any number of workers.

    python ./datasets/phantom.py --train 48 --val 16 --test 32
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.splits import LIST_NAMES, write_lists
from utils.cli import ArgumentParser, UserError, run
from utils.files import writing
from utils.processes import in_processes

MODALITIES = ("flair", "t1", "t1ce", "t2")


def subject_name(number: int) -> str:
    """Return the subject's name, which is its folder's name and the prefix of its files."""
    return f"BraTS2021_{number:05d}"


def write_subject(output_dir: Path, seed: int, number: int, split: str, healthy: bool = False) -> None:
    """Generate a subject and write its five volumes."""
    import nibabel as nib

    from datasets.phantom_anatomy import AFFINE
    from datasets.phantom_head import make_subject
    from utils.nifti import write_volume

    volumes, _, _ = make_subject(seed, number, split, healthy)
    folder = output_dir / subject_name(number)
    folder.mkdir(exist_ok=True)
    for kind, volume in volumes.items():
        image = nib.Nifti1Image(volume, AFFINE)
        image.set_sform(AFFINE, code="scanner")
        image.set_qform(AFFINE, code="scanner")
        image.header.set_xyzt_units("mm")
        write_volume(image, folder / f"{folder.name}_{kind}.nii.gz")


def write_cohort(output_dir: Path, counts: dict[str, int], seed: int, workers: int, healthy: int = 0) -> None:
    """Write all subjects and then the split lists, so that a list never names a missing subject.

    The `healthy` subjects of val, then those of test, have the last numbers, so that they change no other subject.
    """
    splits = [split for split in LIST_NAMES for _ in range(counts[split])]
    splits += [split for split in ("val", "test") for _ in range(healthy)]
    n_patients = sum(counts.values())
    jobs = [(output_dir, seed, number, split, number >= n_patients) for number, split in enumerate(splits)]
    with writing(output_dir, "--output_dir"):
        for _, done in in_processes(write_subject, jobs, workers, desc="phantom", unit="subject"):
            done.result()
    lists = {name: [subject_name(i) for i, split in enumerate(splits) if split == name] for name in LIST_NAMES}
    write_lists(lists, output_dir)


def draw_figure(data_dir: Path, names: list[str], path: Path) -> None:
    """Plot one row per subject: all modalities at the slice in [70, 90) with the largest tumour, outlined in red."""
    import nibabel as nib
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.5 * len(names)), facecolor="black", layout="tight")
    axes = figure.subplots(len(names), len(MODALITIES), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        files = {kind: data_dir / name / f"{name}_{kind}.nii.gz" for kind in (*MODALITIES, "seg")}
        volumes = {kind: np.asarray(nib.load(file).dataobj) for kind, file in files.items()}
        z = 70 + (volumes["seg"][:, :, 70:90] > 0).sum((0, 1)).argmax()
        shown = {kind: volume[35:205, 30:235, z].T for kind, volume in volumes.items()}
        for axis, modality in zip(row, MODALITIES, strict=True):
            axis.imshow(shown[modality], cmap="gray", vmin=0, vmax=np.quantile(shown[modality], 0.997))
            axis.contour(shown["seg"] > 0, [0.5], colors="tab:red", linewidths=0.7)
            axis.set_title(f"{modality}, {name}, slice {z}", color="white", fontsize=6)
            axis.set_axis_off()
    with writing(path.parent, "--figure"):
        figure.savefig(path, dpi=150)


def parse_args() -> Namespace:
    """Parse and validate the command line, and create the output folder."""
    parser = ArgumentParser(description="Make a phantom cohort of synthetic brain MRI in BraTS 2021 format.")
    output_dir = Path("./datasets/phantom_raw")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="folder for the cohort")
    for split, count in {"train": 48, "val": 16, "test": 32}.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"number of {split} subjects")
    parser.add_argument(
        "--healthy", type=int, default=0, help="number of further subjects without a tumour in val, and in test"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cohort")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of worker processes")
    parser.add_argument("--figure", type=Path, help="also plot the first test subjects to this PNG file")
    args = parser.parse_args()
    for name, least in {"train": 1, "val": 1, "test": 1, "healthy": 0, "workers": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be {least} or more")
    if args.figure and (args.figure.suffix != ".png" or not args.figure.parent.is_dir()):
        raise UserError(f"--figure is {args.figure}: choose a .png file in an existing folder")
    with writing(args.output_dir, "--output_dir"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse_args()
    counts = {split: getattr(args, split) for split in LIST_NAMES}
    write_cohort(args.output_dir, counts, args.seed, args.workers, args.healthy)
    counts |= {"healthy val": args.healthy, "healthy test": args.healthy}
    listed = ", ".join(f"{count} {group}" for group, count in counts.items() if count)
    print(f"Wrote {sum(counts.values())} subjects ({listed}) and their split lists to {args.output_dir}.")
    if args.figure:
        first = args.train + args.val
        draw_figure(args.output_dir, [subject_name(first + n) for n in range(min(4, args.test))], args.figure)
        print(f"Plotted the first test subjects to {args.figure}.")


if __name__ == "__main__":
    run(main)
