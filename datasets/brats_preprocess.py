"""Turn the raw volumes of BraTS into normalised 2D slices, sorted into training, validation and testing.

    python ./datasets/brats_preprocess.py --data_dir DIR --output_dir OUT

Writes OUT/{train,val,test}/{modality…,seg,brainmask}/{subject}_{kind}_{slice}.npy: float32 images, uint8
segmentations with their labels kept, uint8 brain masks. Training gets every slice without tumour of the range asked
for; validation and testing get of each subject the one slice with the largest tumour.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.split_traintest import (
    BRATS_DIR,
    LIST_NAMES,
    VOLUME_SUFFIXES,
    Splits,
    find_subjects,
    hash_validation_out_of,
    read_list,
    split_subjects,
    volume_kinds,
    write_lists,
)
from utils.cli import ArgumentParser, UserError, did_you_mean, run

# numpy, nibabel and tqdm are imported where they are used, so that `--help` and a mistyped flag need not wait.
if TYPE_CHECKING:
    import numpy as np

BACKGROUND = -3.0  # the normalised value of background and of the lower quantile
BRIGHT = 3.0  # the normalised value of the upper quantile


@dataclass(frozen=True)
class Settings:
    """What one run does to each subject."""

    data_dir: Path
    output_dir: Path
    modalities: tuple[str, ...]
    percentage_lower: float  # quantiles, in [0, 1]
    percentage_upper: float
    start: int  # slices [start, stop) of the third axis
    stop: int


def main() -> None:
    args = parse_args()
    settings = Settings(
        args.data_dir,
        args.output_dir,
        args.modality,
        args.percentage_lower,
        args.percentage_upper,
        *args.slices,
    )

    subjects = find_subjects(settings.data_dir)
    list_paths = find_lists(settings.data_dir) | explicit_lists(args)
    splits = read_splits(list_paths, subjects) if list_paths else split_subjects(subjects)
    check_modalities(settings, subjects)
    check_headers(settings, splits)
    earlier = find_earlier_slices(settings, splits)

    prepare_output(settings, splits, earlier)
    if not list_paths:
        write_lists(splits, settings.output_dir)
    print_plan(settings, splits, list_paths, len(subjects))
    counts = preprocess(settings, splits, args.workers)
    print_summary(settings, splits, counts)


# ----------------------------------------------------------------------------------------------------------
# Command line


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Turn the raw volumes of BraTS into normalised 2D slices.")
    parser.add_argument(
        "--modality", type=comma_list, default="t2,flair,t1", help="modalities, separated by commas"
    )
    parser.add_argument(
        "--data_dir", type=Path, default=BRATS_DIR, help="folder with one folder for each subject"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("datasets/data"), help="where the slices go")
    parser.add_argument(
        "--percentage_upper",
        type=float,
        default=0.9,
        help=f"quantile of the brain's voxels that becomes {BRIGHT:+g}",
    )
    parser.add_argument(
        "--percentage_lower",
        type=float,
        default=0.02,
        help=f"quantile of the brain's voxels that becomes {BACKGROUND:+g}",
    )
    for part, name in LIST_NAMES.items():
        otherwise = "hashed out of training" if part == "val" else "made by split_traintest.py"
        parser.add_argument(
            f"--{part}_split",
            type=Path,
            default=argparse.SUPPRESS,
            help=f"list of subjects, one a line (default: {name} in data_dir or ./datasets, else {otherwise})",
        )
    parser.add_argument(
        "--slices",
        type=int,
        nargs=2,
        metavar=("START", "STOP"),
        default=[70, 90],
        help="range of axial slices, counted from 0, START included and STOP not",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="subjects at a time, all cores if not given"
    )
    args = parser.parse_args()

    if not 0 <= args.percentage_lower < args.percentage_upper <= 1:
        parser.error(
            "percentages must obey 0 <= lower < upper <= 1, "
            f"not {args.percentage_lower:g} and {args.percentage_upper:g}"
        )
    if not 0 <= args.slices[0] < args.slices[1]:
        parser.error(f"--slices must obey 0 <= START < STOP, not {args.slices[0]} and {args.slices[1]}")
    if args.workers < 1:
        parser.error(f"--workers must be 1 or more, not {args.workers}")
    return args


def comma_list(text: str) -> tuple[str, ...]:
    """`("t2", "flair")` for "t2, flair"; repetitions count once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


# ----------------------------------------------------------------------------------------------------------
# Which subject belongs to which part


def find_lists(data_dir: Path) -> dict[str, Path]:
    """The split lists that lie in `data_dir`, else those in ./datasets, by part; never some from either."""
    for folder in (data_dir, Path("datasets")):
        found = {part: folder / name for part, name in LIST_NAMES.items() if (folder / name).exists()}
        if found:
            return found
    return {}


def explicit_lists(args: argparse.Namespace) -> dict[str, Path]:
    """The split lists named on the command line, by part."""
    return {part: getattr(args, f"{part}_split") for part in LIST_NAMES if hasattr(args, f"{part}_split")}


def read_splits(list_paths: dict[str, Path], subjects: list[str]) -> Splits:
    """Read the lists; validation is hashed out of training where it has none. A list may be empty, but not all.

    Raises:
        UserError: no training or no testing list, a subject that is not on disk, or one that is in two lists.
    """
    for part in ("train", "test"):
        if part not in list_paths:
            given = next(iter(list_paths.values()))
            raise UserError(
                f"there is {given}, but no {LIST_NAMES[part]}: name one with --{part}_split, it may be empty"
            )
    listed = {part: read_list(path) for part, path in list_paths.items()}
    check_lists(listed, list_paths, set(subjects))
    if "val" not in listed:
        listed["train"], listed["val"] = hash_validation_out_of(listed["train"])
    return {part: listed[part] for part in LIST_NAMES}


def check_lists(listed: Splits, list_paths: dict[str, Path], on_disk: set[str]) -> None:
    """Raise a UserError unless every subject is on disk and in one list only, and there is one at all."""
    first_seen: dict[str, Path] = {}
    for part, names in listed.items():
        for name in names:
            if name not in on_disk:
                raise UserError(f"{list_paths[part]} lists {name}, of which --data_dir has no volumes")
            if name in first_seen:
                raise UserError(
                    f"{name} is both in {first_seen[name]} and in {list_paths[part]}: take it out of one"
                )
            first_seen[name] = list_paths[part]
    if not first_seen:
        raise UserError("the split lists are all empty: put at least one subject into one of them")


# ----------------------------------------------------------------------------------------------------------
# Checks before anything is written


def check_modalities(settings: Settings, subjects: list[str]) -> None:
    """Raise a UserError for a modality that none of the subjects has."""
    known = set().union(*(volume_kinds(settings.data_dir / subject) for subject in subjects))
    known -= {"seg", "brainmask"}
    for modality in settings.modalities:
        if modality not in known:
            has = ", ".join(sorted(known)) or "no modality"
            raise UserError(
                f"unknown modality {modality!r}, the data have {has}{did_you_mean(modality, known)}"
            )


def check_headers(settings: Settings, splits: Splits) -> None:
    """Raise a UserError unless each subject has all its volumes, of one 3D shape that covers the slices.

    It reads headers only, so that a whole cohort is checked in seconds.
    """
    for subject in chain.from_iterable(splits.values()):
        first, *others = (
            volume_path(settings.data_dir, subject, kind) for kind in (*settings.modalities, "seg")
        )
        shape = read_shape(first)
        if len(shape) != 3:
            raise UserError(f"{first} must hold a volume with 3 axes, but its shape is {shape}")
        if settings.stop > shape[2]:
            raise UserError(
                f"--slices {settings.start} {settings.stop} exceeds {first}, which has {shape[2]} slices"
            )
        for other in others:
            if read_shape(other) != shape:
                raise UserError(
                    f"{other} has shape {read_shape(other)}, but {first.name} has {shape}: they must agree"
                )


def find_earlier_slices(settings: Settings, splits: Splits) -> list[Path]:
    """The slices of an earlier run that this run replaces.

    Raises:
        UserError: there are others (of a subject that is now in another part or in none, or of a modality not
            asked for now), which would be mixed up with the new ones.
    """
    kinds = {*settings.modalities, "seg", "brainmask"}
    members = {part: set(subjects) for part, subjects in splits.items()}
    earlier = []
    for part in splits:
        for path in settings.output_dir.glob(f"{part}/*/*.npy"):
            kind = path.parent.name
            name = re.fullmatch(rf"(.+)_{re.escape(kind)}_\d+", path.stem)
            if kind not in kinds or name is None or name[1] not in members[part]:
                raise UserError(
                    f"{path} is of an earlier run with other subjects or modalities: "
                    "remove the old slices or name another --output_dir"
                )
            earlier.append(path)
    return earlier


def prepare_output(settings: Settings, splits: Splits, earlier: list[Path]) -> None:
    """Make the output folders and remove the slices that this run replaces.

    They go all at once before the first new one is written, so that a run that breaks off leaves too few slices,
    but never slices of two settings.
    """
    try:
        for part in splits:
            for kind in (*settings.modalities, "seg", "brainmask"):
                (settings.output_dir / part / kind).mkdir(parents=True, exist_ok=True)
        for path in earlier:
            path.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {settings.output_dir} cannot be written to: {error}") from error


# ----------------------------------------------------------------------------------------------------------
# The work on one subject


def preprocess_subject(settings: Settings, part: str, subject: str) -> int:
    """Normalise the subject's volumes, choose its slices and write them; returns how many slices.

    Raises:
        UserError: a volume cannot be read or normalised, or a slice not written; the message names the file.
    """
    window = slice(settings.start, settings.stop)
    stacks = {}  # by kind: [H, W, stop - start]
    brainmask = False
    for modality in settings.modalities:
        path = volume_path(settings.data_dir, subject, modality)
        volume = read_volume(path)
        try:
            image = normalise(volume, settings.percentage_lower, settings.percentage_upper)
        except ValueError as error:
            raise UserError(f"{path} cannot be normalised: {error}") from error
        stacks[modality] = image[:, :, window].copy()  # a view would keep the whole volume in memory
        brainmask = brainmask | (volume[:, :, window] != 0)
    stacks["brainmask"] = brainmask.astype("uint8")
    stacks["seg"] = read_labels(volume_path(settings.data_dir, subject, "seg"), window)

    chosen = choose_slices(part, stacks["seg"], stacks["brainmask"])
    for index in chosen:
        for kind, stack in stacks.items():
            name = f"{subject}_{kind}_{settings.start + index}.npy"
            write_slice(settings.output_dir / part / kind / name, stack[:, :, index])
    return len(chosen)


def normalise(volume: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Scale intensities linearly, so that two quantiles of the brain land on -3 and +3.

    The brain is every voxel that is not 0. Those below 0 belong to it: real scans have them.

    Args:
        volume: raw intensities, of any shape and any real dtype; background is 0.
        lower: the quantile of the brain's voxels, in [0, 1], that becomes -3; darker voxels become -3 too.
        upper: the quantile, in (lower, 1], that becomes +3; brighter voxels go beyond.

    Returns:
        float32 array of the same shape, nothing below -3, background exactly -3.

    Raises:
        ValueError: no voxel but 0, a voxel that is not finite, or two quantiles that coincide.
    """
    import numpy as np

    brain = volume != 0
    voxels = volume[brain]
    if voxels.size == 0:
        raise ValueError("every voxel is 0")
    if not np.isfinite(voxels).all():
        raise ValueError("some voxels are not finite")
    low, high = np.quantile(voxels, [lower, upper]).astype(np.float64)
    if low == high:
        raise ValueError(f"its {lower:g} and {upper:g} quantiles are both {low:g}")
    scaled = (voxels - low) / (high - low) * (BRIGHT - BACKGROUND) + BACKGROUND
    image = np.full(volume.shape, BACKGROUND, dtype=np.float32)
    image[brain] = np.maximum(scaled, BACKGROUND)
    return image


def choose_slices(part: str, seg: np.ndarray, brainmask: np.ndarray) -> list[int]:
    """Which of N slices go into `part`; those without brain never do.

    Args:
        part: "train" for every slice without tumour; "val" or "test" for the one with the largest tumour (the
            first of equals), or none where there is no tumour.
        seg: labels, [H, W, N]; tumour is > 0.
        brainmask: [H, W, N]; brain is > 0.

    Returns:
        Ascending indices on the last axis.
    """
    tumour_area = (seg > 0).sum(axis=(0, 1))  # pixels
    has_brain = brainmask.any(axis=(0, 1))
    if part == "train":
        return [int(index) for index in (has_brain & (tumour_area == 0)).nonzero()[0]]
    tumour_area[~has_brain] = 0
    return [int(tumour_area.argmax())] if tumour_area.any() else []


# ----------------------------------------------------------------------------------------------------------
# Files


def volume_path(data_dir: Path, subject: str, kind: str) -> Path:
    """The subject's volume of `kind`, compressed or not; a UserError names the file that is not there."""
    candidates = [data_dir / subject / f"{subject}_{kind}{suffix}" for suffix in VOLUME_SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{candidates[0]} is missing: restore it or take {subject} out of the data")


def read_shape(path: Path) -> tuple[int, ...]:
    """The shape that the volume's header states."""
    import nibabel

    try:
        return nibabel.load(path).shape
    except Exception as error:  # a broken file raises whatever gzip, zlib, numpy or nibabel stumble over
        raise unreadable(path, error) from error


def read_volume(path: Path) -> np.ndarray:
    """The volume's intensities, [H, W, D], in the dtype on disk, or floats where the header scales them."""
    import nibabel
    import numpy as np

    try:
        return np.asarray(nibabel.load(path).dataobj)
    except Exception as error:  # as in read_shape
        raise unreadable(path, error) from error


def read_labels(path: Path, window: slice) -> np.ndarray:
    """The segmentation's labels in a range of slices, [H, W, N] uint8; a UserError where uint8 cannot hold them."""
    labels = read_volume(path)[:, :, window]
    if not ((labels >= 0) & (labels <= 255) & (labels % 1 == 0)).all():
        raise UserError(f"{path} must hold labels, whole numbers from 0 to 255, but holds other values")
    return labels.astype("uint8")


def unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())  # some of nibabel's messages have several lines
    return UserError(f"{path} cannot be read: {type(error).__name__}, {reason}")


def write_slice(path: Path, image: np.ndarray) -> None:
    """Save one slice [H, W] in the orientation of the volume's array."""
    import numpy as np

    try:
        np.save(path, np.ascontiguousarray(image))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


# ----------------------------------------------------------------------------------------------------------
# All subjects


def preprocess(settings: Settings, splits: Splits, workers: int) -> dict[str, int]:
    """Work on all subjects, `workers` at a time; returns the number of slices written by subject."""
    from tqdm import tqdm

    jobs = [(part, subject) for part, subjects in splits.items() for subject in subjects]
    # Ctrl-C is for the parent to answer: each worker would print a traceback.
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(min(workers, len(jobs)), **ignore) as pool:
        try:
            futures = {pool.submit(preprocess_subject, settings, *job): job[1] for job in jobs}
            done = tqdm(as_completed(futures), total=len(futures), unit="subject", disable=None)
            return {futures[future]: future.result() for future in done}
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, perhaps for want of memory: try fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, leave the remaining subjects


def print_plan(settings: Settings, splits: Splits, list_paths: dict[str, Path], n_on_disk: int) -> None:
    """Say what is about to happen, in two lines."""
    n_subjects = sum(len(subjects) for subjects in splits.values())
    if not list_paths:
        origin = f"made and written to {settings.output_dir}"
    else:
        origin = ", ".join(str(path) for path in list_paths.values())
        origin += "" if "val" in list_paths else "; validation hashed out of training"
    print(f"{n_subjects} of {n_on_disk} subjects in {settings.data_dir}, slices to {settings.output_dir}")
    print(f"split lists: {origin}", flush=True)


def print_summary(settings: Settings, splits: Splits, counts: dict[str, int]) -> None:
    """Print what was read, what was written, and who was left out and why."""
    for part, subjects in splits.items():
        n_slices = sum(counts[subject] for subject in subjects)
        print(f"{part}: subjects read: {len(subjects)}, slices written: {n_slices}")
    for part, subjects in splits.items():
        left_out = [subject for subject in subjects if counts[subject] == 0]
        if left_out:
            lacking = "no tumour-free slice" if part == "train" else "no tumour"
            where = f"in slices {settings.start} to {settings.stop - 1}"
            print(f"{part}: left out, {lacking} {where}: {len(left_out)} ({name_a_few(left_out)})")


def name_a_few(names: list[str], limit: int = 5) -> str:
    """`a, b, c` or, beyond the limit, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    run(main)
