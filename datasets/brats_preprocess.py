"""Turn the raw volumes of BraTS into normalised 2D slices, sorted into training, validation and testing.

    python ./datasets/brats_preprocess.py --data_dir DIR --output_dir OUT

Writes OUT/{train,val,test}/{modality…,seg,brainmask}/{subject}_{kind}_{slice}.npy: float32 images, uint8
segmentations with their labels kept, uint8 brain masks. Training gets every slice without tumour of the range asked
for; validation and testing get of each subject the one slice with the largest tumour.

A subject is written whole or not at all. Run again, the same command makes what is missing and leaves the rest
alone; a subject that cannot be read is left out and reported at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.records import RECORDS, Record, clear, find_whole, locked, store, writing
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

# numpy, tqdm and what reads volumes are imported where they are used: `--help` and a mistyped flag need not wait.
if TYPE_CHECKING:
    import numpy as np

    from datasets.volumes import Grid

BACKGROUND = -3.0  # the normalised value of background and of the lower quantile
BRIGHT = 3.0  # the normalised value of the upper quantile
BEGIN_ANEW = "give --overwrite to begin anew, or name another --output_dir"
MEND = "replace the file and run the same command again"
LABELS = (0, 1, 2, 3, 4)  # of a segmentation; BraTS 2021 uses all but 3, other years do not

Job = tuple[str, str]  # part and subject


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

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of slices that are written."""
        return (*self.modalities, "seg", "brainmask")


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
    listed = [subject for part in splits.values() for subject in part]
    check_volumes(settings, listed)
    check_slices(settings, listed)

    with locked(settings.output_dir):
        finished = {} if args.overwrite else find_finished(settings, splits)
        leftovers = find_leftovers(settings, splits, finished, args.overwrite)
        clear(settings.output_dir, finished, leftovers)
        make_folders(settings, splits)
        if not list_paths:
            update_lists(splits, settings.output_dir)
        print_plan(settings, splits, list_paths, len(subjects), len(finished))
        jobs = [(part, name) for part, names in splits.items() for name in names if name not in finished]
        made, failures = preprocess(settings, jobs, args.workers)
    print_summary(settings, splits, finished, made, failures)
    if failures:
        for reason in sorted(failures.values()):
            print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
        sys.exit(1)


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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew: remove all slices that earlier runs wrote to output_dir",
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


def check_volumes(settings: Settings, subjects: list[str]) -> None:
    """Raise a UserError for a subject that lacks a volume."""
    for subject in subjects:
        for kind in (*settings.modalities, "seg"):
            volume_path(settings.data_dir, subject, kind)


def check_slices(settings: Settings, subjects: list[str]) -> None:
    """Raise a UserError where no volume has all the slices asked for: then it is the flag that is wrong.

    Where just some have not, it is these that are, and they are reported in their turn.
    """
    from datasets.volumes import read_shape

    shallow = None
    for subject in subjects:
        path = volume_path(settings.data_dir, subject, settings.modalities[0])
        try:
            depth = read_shape(path)[2]
        except UserError:  # reported in its turn, too
            continue
        if depth >= settings.stop:
            return
        shallow = shallow or too_shallow(settings, path, depth)
    if shallow:
        raise shallow


def too_shallow(settings: Settings, path: Path, depth: int) -> UserError:
    return UserError(f"--slices {settings.start} {settings.stop} exceeds {path}, which has {depth} slices")


# ----------------------------------------------------------------------------------------------------------
# What earlier runs left


def find_finished(settings: Settings, splits: Splits) -> dict[str, Record]:
    """The subjects that earlier runs finished, with their records.

    Raises:
        UserError: one of them this run would make otherwise, or not at all; the two must not be mixed.
    """
    finished = find_whole(settings.output_dir)
    parts = {subject: part for part, subjects in splits.items() for subject in subjects}
    for subject, record in finished.items():
        if subject not in parts:
            difference = "which is in no split list now"
        else:
            difference = name_difference(record.made_with, describe(settings, parts[subject], subject))
        if difference:
            raise UserError(f"{settings.output_dir} holds {subject}, {difference}: {BEGIN_ANEW}")
    return finished


def describe(settings: Settings, part: str, subject: str) -> dict:
    """All that a subject's slices depend on, in JSON's types."""
    from datasets.volumes import checksum

    modalities = sorted(settings.modalities)  # their order changes nothing
    return {
        "split": part,
        "modality": ",".join(modalities),
        "slices": f"{settings.start} {settings.stop}",
        "percentage_lower": settings.percentage_lower,
        "percentage_upper": settings.percentage_upper,
        "volumes": {
            kind: checksum(volume_path(settings.data_dir, subject, kind)) for kind in (*modalities, "seg")
        },
    }


def name_difference(made_with: dict, asked_for: dict) -> str:
    """The first thing in which two descriptions of a subject differ, as a clause; empty where they agree."""
    for key, now in asked_for.items():
        before = made_with.get(key)
        if before != now:
            if key == "volumes":
                kinds = [
                    kind for kind in now if not isinstance(before, dict) or before.get(kind) != now[kind]
                ]
                return f"made from another {' and '.join(kinds)} than --data_dir has of it now"
            if key == "split":
                return f"which was in the {before} split and is in {now} now"
            return f"made with --{key} {before}, not {now}"
    return ""


def find_leftovers(
    settings: Settings, splits: Splits, finished: dict[str, Record], overwrite: bool
) -> list[Path]:
    """The slices that lie about beside those of finished subjects, sorted: a run that broke off left them.

    Raises:
        UserError: a file that is no slice; or, unless all are overwritten, a slice that this run has no use for (of a
            subject that is now in another part or in none, or of a modality not asked for now).
    """
    in_use = {name for record in finished.values() for name in record.files}
    members = {part: set(subjects) for part, subjects in splits.items()}
    leftovers = []
    for part in splits:
        for path in sorted(settings.output_dir.glob(f"{part}/*/*.npy")):
            kind = path.parent.name
            name = re.fullmatch(rf"(.+)_{re.escape(kind)}_\d+", path.stem)
            if name is None:
                raise UserError(
                    f"{path} is no slice that this script wrote: move it away or name another --output_dir"
                )
            if f"{part}/{kind}/{path.name}" in in_use:
                continue
            if not overwrite and (kind not in settings.kinds or name[1] not in members[part]):
                raise UserError(
                    f"{path} is of an earlier run with other subjects or modalities: {BEGIN_ANEW}"
                )
            leftovers.append(path)
    return leftovers


def make_folders(settings: Settings, splits: Splits) -> None:
    """Those of the slices and of the records."""
    with writing(settings.output_dir):
        (settings.output_dir / RECORDS).mkdir(exist_ok=True)
        for part in splits:
            for kind in settings.kinds:
                (settings.output_dir / part / kind).mkdir(parents=True, exist_ok=True)


def update_lists(splits: Splits, output_dir: Path) -> None:
    """Write the lists of a split made here, unless they are there already."""
    paths = {part: output_dir / name for part, name in LIST_NAMES.items()}
    if not all(path.exists() and read_list(path) == splits[part] for part, path in paths.items()):
        write_lists(splits, output_dir)


# ----------------------------------------------------------------------------------------------------------
# The work on one subject


def cut_subject(settings: Settings, part: str, subject: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Normalise the subject's volumes and choose its slices.

    Returns:
        What the slices depend on, as in `describe`, and images [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, one
        kind after the other: float32 for modalities, uint8 for seg and brainmask.

    Raises:
        UserError: a volume cannot be read or normalised, or does not fit the others; the message names the file.
    """
    made_with = describe(settings, part, subject)
    window = slice(settings.start, settings.stop)
    stacks = {}  # by kind: [H, W, stop - start]
    brainmask = False
    first = None  # the modality that the others are compared with
    for modality in settings.modalities:
        path = volume_path(settings.data_dir, subject, modality)
        volume, first = read_aligned(settings, path, first)
        try:
            image = normalise(volume, settings.percentage_lower, settings.percentage_upper)
        except ValueError as error:
            raise UserError(f"{path} cannot be normalised, {error}") from error
        stacks[modality] = image[:, :, window].copy()  # a view would keep the whole volume in memory
        brainmask = brainmask | (volume[:, :, window] != 0)
    stacks["brainmask"] = brainmask.astype("uint8")
    stacks["seg"] = read_labels(settings, volume_path(settings.data_dir, subject, "seg"), first)[:, :, window]

    chosen = choose_slices(part, stacks["seg"], stacks["brainmask"])
    return made_with, {
        f"{kind}/{subject}_{kind}_{settings.start + index}.npy": stack[:, :, index].copy()
        for kind, stack in stacks.items()
        for index in chosen
    }


def read_aligned(settings: Settings, path: Path, first: Grid | None) -> tuple[np.ndarray, Grid]:
    """A volume [H, W, D] that has the slices asked for, on the grid of the subject's first one if there is one.

    Raises:
        UserError: it cannot be read, has too few slices, or another shape or affine than the first.
    """
    import numpy as np

    from datasets.volumes import read_volume

    volume, grid = read_volume(path)
    if first is None:
        first = grid
    if grid.shape != first.shape:
        raise UserError(f"{path} has shape {grid.shape}, but {first.path.name} has {first.shape}")
    if not np.allclose(grid.affine, first.affine, atol=1e-3):  # mm; header fields are rounded to float32
        raise UserError(f"{path} lies elsewhere in space than {first.path.name}, their affines differ")
    if grid.shape[2] < settings.stop:
        raise too_shallow(settings, path, grid.shape[2])
    return volume, first


def read_labels(settings: Settings, path: Path, first: Grid) -> np.ndarray:
    """The segmentation's labels, [H, W, D] uint8; a UserError where it holds others than BraTS knows."""
    import numpy as np

    labels, _ = read_aligned(settings, path, first)
    tumour = labels[labels != 0]  # few of all voxels, which makes the search among them quick
    unknown = tumour[~np.isin(tumour, LABELS)]
    if unknown.size:
        raise UserError(f"{path} must hold labels, whole numbers from 0 to 4, but holds {unknown[0]:g}")
    return labels.astype("uint8")


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
        ValueError: no voxel but 0, a voxel that is not finite, two quantiles that coincide, or a range of
            intensities that floating point cannot scale.
    """
    import numpy as np

    brain = volume != 0
    voxels = volume[brain]
    if voxels.size == 0:
        raise ValueError("every voxel is 0")
    if not np.isfinite(voxels).all():
        raise ValueError("some voxels are not finite")
    with np.errstate(all="ignore"):  # whatever overflows is not finite at the end
        low, high = np.quantile(voxels, [lower, upper]).astype(np.float64)
        if low == high:
            raise ValueError(f"its {lower:g} and {upper:g} quantiles are both {low:g}")
        scaled = (voxels - low) / (high - low) * (BRIGHT - BACKGROUND) + BACKGROUND
        image = np.full(volume.shape, BACKGROUND, dtype=np.float32)
        image[brain] = np.maximum(scaled, BACKGROUND)
    if not np.isfinite(image).all():
        raise ValueError("its intensities differ by too many orders of magnitude")
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


def volume_path(data_dir: Path, subject: str, kind: str) -> Path:
    """The subject's volume of `kind`, compressed or not; a UserError names the file that is not there."""
    candidates = [data_dir / subject / f"{subject}_{kind}{suffix}" for suffix in VOLUME_SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{candidates[0]} is missing: restore it or take {subject} out of the data")


# ----------------------------------------------------------------------------------------------------------
# All subjects


def preprocess(settings: Settings, jobs: list[Job], workers: int) -> tuple[dict[str, Record], dict[str, str]]:
    """Make subjects, `workers` at a time; returns the records of those made, and why the others were not.

    Workers read and calculate, and this process writes: when it is killed, nobody writes any more.
    """
    from tqdm import tqdm

    made, failures = {}, {}
    if not jobs:
        return made, failures
    workers = min(workers, len(jobs))
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            done = completed(lambda job: pool.submit(cut_subject, settings, *job), jobs, 2 * workers)
            for (part, subject), future in tqdm(done, total=len(jobs), unit="subject", disable=None):
                try:
                    made_with, slices = future.result()
                except UserError as error:
                    failures[subject] = f"{error}; {subject} is left out: {MEND}"
                except MemoryError:
                    folder = settings.data_dir / subject
                    failures[subject] = f"{folder} needs more memory than there is: try fewer --workers"
                else:
                    made[subject] = store(settings.output_dir, part, subject, made_with, slices)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory: run the same command with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, leave the remaining subjects
    return made, failures


def start_worker() -> None:
    """Leave Ctrl-C to the parent, for a worker would answer it with a traceback; and end when the parent has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def completed(
    submit: Callable[[Job], Future], jobs: Iterable[Job], ahead: int
) -> Iterator[tuple[Job, Future]]:
    """Each job with its future, when it is done; no more than `ahead` at a time, lest slices pile up in memory."""
    jobs = iter(jobs)
    running = {submit(job): job for job in islice(jobs, ahead)}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future
            running.update({submit(job): job for job in islice(jobs, 1)})


def print_plan(
    settings: Settings, splits: Splits, list_paths: dict[str, Path], n_on_disk: int, n_finished: int
) -> None:
    """Say what is about to happen, in a few lines."""
    n_subjects = sum(len(subjects) for subjects in splits.values())
    if not list_paths:
        origin = f"made and written to {settings.output_dir}"
    else:
        origin = ", ".join(str(path) for path in list_paths.values())
        origin += "" if "val" in list_paths else "; validation hashed out of training"
    print(f"{n_subjects} of {n_on_disk} subjects in {settings.data_dir}, slices to {settings.output_dir}")
    print(f"split lists: {origin}", flush=True)
    if n_finished:
        print(f"there already: {n_finished} of {n_subjects} subjects", flush=True)


def print_summary(
    settings: Settings,
    splits: Splits,
    finished: dict[str, Record],
    made: dict[str, Record],
    failures: dict[str, str],
) -> None:
    """Print what was there, read and written, and who was left out and why."""
    for part, subjects in splits.items():
        n_there = sum(subject in finished for subject in subjects)
        n_slices = sum(n_slices_of(made[subject]) for subject in subjects if subject in made)
        there = f", subjects there already: {n_there}" if n_there else ""
        print(f"{part}: subjects read: {len(subjects) - n_there}, slices written: {n_slices}{there}")
    records = finished | made
    for part, subjects in splits.items():
        lacking = "no tumour-free slice" if part == "train" else "no tumour"
        reasons = {
            f"{lacking} in slices {settings.start} to {settings.stop - 1}": [
                subject for subject in subjects if subject in records and not records[subject].files
            ],
            "bad volumes": [subject for subject in subjects if subject in failures],
        }
        for reason, left_out in reasons.items():
            if left_out:
                print(f"{part}: left out, {reason}: {len(left_out)} ({name_a_few(left_out)})")


def n_slices_of(record: Record) -> int:
    return sum("/seg/" in name for name in record.files)


def name_a_few(names: list[str], limit: int = 5) -> str:
    """`a, b, c` or, beyond the limit, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    run(main)
