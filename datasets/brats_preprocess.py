"""Turn raw volumes into normalised 2D slices, sorted into training, validation and testing.

    python ./datasets/brats_preprocess.py --data_dir DIR --output_dir OUT
    python ./datasets/brats_preprocess.py --csv TABLE.csv --output_dir OUT

The first reads a folder of BraTS, the second any data set that a table describes (see datasets/cohorts.py). BraTS stays
on its own grid; each subject of another data set is put on the grid of BraTS, so that a slice's number says how high in
the brain it lies.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.cohorts import BRATS_DIR, MASKS, Cohort, Subject, read_brats, read_table, require_known
from datasets.records import RECORDS, Record, clear, find_whole, locked, store, writing
from datasets.split_traintest import (
    LIST_NAMES,
    Splits,
    hash_validation_out_of,
    read_list,
    split_subjects,
    write_lists,
)
from utils.cli import ArgumentParser, UserError, run

# numpy, tqdm and what reads volumes are imported where they are used: `--help` and a mistyped flag need not wait.
if TYPE_CHECKING:
    import numpy as np

    from datasets.volumes import Grid

BACKGROUND = -3.0  # the normalised value of background and of the lower quantile
BRIGHT = 3.0  # the normalised value of the upper quantile
BEGIN_ANEW = "give --overwrite to begin anew, or name another --output_dir"
MEND = "replace the file and run the same command again"
DEPTH = 155  # slices that a subject gets that is put on the grid of BraTS, as many as there, the brain in their middle
# Share of the brain's voxels beyond this grid: a neck may be cut off, but no brain is so large.
MOST_OUTSIDE = 0.5
BRATS_MODALITIES = ("t2", "flair", "t1")

Job = tuple[str, Subject]  # with the part that it belongs to


@dataclass(frozen=True)
class Settings:
    """What one run does to each subject."""

    output_dir: Path
    modalities: tuple[str, ...]
    percentage_lower: float  # quantiles, in [0, 1]
    percentage_upper: float
    start: int  # slices [start, stop) of the third axis
    stop: int
    highest_label: int  # of a segmentation
    on_one_grid: bool  # the data are, and stay there; otherwise each subject is put on the grid of BraTS

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of slices that are written."""
        return (*self.modalities, *MASKS)


def main() -> None:
    args = parse_args()
    cohort = read_table(args.csv) if args.csv else read_brats(args.data_dir or BRATS_DIR)
    modalities = args.modality or (cohort.modalities if args.csv else BRATS_MODALITIES)
    require_known(modalities, cohort)
    settings = Settings(
        args.output_dir,
        modalities,
        args.percentage_lower,
        args.percentage_upper,
        *args.slices,
        cohort.highest_label,
        cohort.on_one_grid,
    )

    list_paths = find_lists(cohort.list_folders) | explicit_lists(args)
    splits = choose_splits(cohort, list_paths)
    subjects = [cohort.subjects[name] for names in splits.values() for name in names]
    check_volumes(settings, cohort.source, subjects)
    check_slices(settings, subjects)

    with locked(settings.output_dir):
        finished = {} if args.overwrite else find_finished(settings, cohort, splits)
        leftovers = find_leftovers(settings, splits, finished, args.overwrite)
        clear(settings.output_dir, finished, leftovers)
        make_folders(settings, splits)
        if not list_paths and not cohort.splits:
            update_lists(splits, settings.output_dir)
        print_plan(settings, cohort, splits, list_paths, len(finished))
        jobs = [
            (part, cohort.subjects[name])
            for part, names in splits.items()
            for name in names
            if name not in finished
        ]
        made, failures = preprocess(settings, jobs, args.workers)
    print_summary(settings, splits, finished, made, failures)
    if cohort.excluded:
        told = f"{len(cohort.excluded)} ({name_a_few(cohort.excluded)})"
        print(f"left out, neither a seg nor healthy=yes: {told}")
    if failures:
        for reason in sorted(failures.values()):
            print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
        sys.exit(1)


# ----------------------------------------------------------------------------------------------------------
# Command line


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Turn the raw volumes of BraTS, or of any data set, into normalised 2D slices."
    )
    parser.add_argument(
        "--modality",
        type=comma_list,
        help=f"modalities, separated by commas (default: {','.join(BRATS_MODALITIES)}; with --csv all of the table)",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        help=f"folder of BraTS, with one folder for each subject (default: {BRATS_DIR})",
    )
    parser.add_argument(
        "--csv", type=Path, help="table of any other data set, a row for each subject, instead of --data_dir"
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
            help="list of subjects, one a line "
            f"(default: {name} in data_dir or ./datasets; the column split of --csv; else {otherwise})",
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

    if args.csv and args.data_dir:
        parser.error("--csv and --data_dir both say where the data are: give one of them")
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


def find_lists(folders: Iterable[Path]) -> dict[str, Path]:
    """The split lists that lie in the first of the folders that has any, by part; never some from either."""
    for folder in folders:
        found = {part: folder / name for part, name in LIST_NAMES.items() if (folder / name).exists()}
        if found:
            return found
    return {}


def explicit_lists(args: argparse.Namespace) -> dict[str, Path]:
    """The split lists named on the command line, by part."""
    return {part: getattr(args, f"{part}_split") for part in LIST_NAMES if hasattr(args, f"{part}_split")}


def choose_splits(cohort: Cohort, list_paths: dict[str, Path]) -> Splits:
    """What the data set says itself, else what the lists say, else a split by hash.

    Raises:
        UserError: the data set says itself and there are lists, too; or as `read_splits` and `split_subjects`.
    """
    if cohort.splits and list_paths:
        raise UserError(
            f"both the column split of {cohort.source} and {next(iter(list_paths.values()))} say who is in which "
            "part: leave the column or the list out"
        )
    if cohort.splits:
        return cohort.splits
    return read_splits(list_paths, cohort) if list_paths else split_subjects(cohort.subjects)


def read_splits(list_paths: dict[str, Path], cohort: Cohort) -> Splits:
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
    check_lists(listed, list_paths, cohort)
    listed = {part: [name for name in names if name in cohort.subjects] for part, names in listed.items()}
    if "val" not in listed:
        listed["train"], listed["val"] = hash_validation_out_of(listed["train"])
    return {part: listed[part] for part in LIST_NAMES}


def check_lists(listed: Splits, list_paths: dict[str, Path], cohort: Cohort) -> None:
    """Raise a UserError unless every subject is in the data and in one list only, and there is one at all."""
    first_seen: dict[str, Path] = {}
    for part, names in listed.items():
        for name in names:
            if name not in cohort.subjects and name not in cohort.excluded:
                raise UserError(f"{list_paths[part]} lists {name}, of which {cohort.source} has no volumes")
            if name in first_seen:
                raise UserError(
                    f"{name} is both in {first_seen[name]} and in {list_paths[part]}: take it out of one"
                )
            first_seen[name] = list_paths[part]
    if not first_seen:
        raise UserError("the split lists are all empty: put at least one subject into one of them")


# ----------------------------------------------------------------------------------------------------------
# Checks before anything is written


def check_volumes(settings: Settings, source: Path, subjects: list[Subject]) -> None:
    """Raise a UserError for a subject that lacks a volume."""
    for subject in subjects:
        for kind in kinds_read(settings, subject):
            path = subject.volumes.get(kind)
            if path is None:
                raise UserError(
                    f"{source} names no {kind} of {subject.name}: fill it in, or leave {kind} out with --modality"
                )
            if not path.is_file():
                raise UserError(f"{path} is missing: restore it or take {subject.name} out of the data")


def kinds_read(settings: Settings, subject: Subject) -> tuple[str, ...]:
    """The kinds of volumes that a subject's slices depend on: modalities, in whatever order, and the masks it has."""
    return (*sorted(settings.modalities), *(kind for kind in MASKS if kind in subject.volumes))


def check_slices(settings: Settings, subjects: list[Subject]) -> None:
    """Raise a UserError where no volume has all the slices asked for: then it is the flag that is wrong.

    Where just some have not, it is these that are, and they are reported in their turn.
    """
    from datasets.volumes import read_shape

    if not settings.on_one_grid:
        if settings.stop > DEPTH:
            raise UserError(
                f"--slices {settings.start} {settings.stop} exceeds the {DEPTH} slices of the grid that every "
                "subject is put on"
            )
        return
    shallow = None
    for subject in subjects:
        path = subject.volumes[settings.modalities[0]]
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


def find_finished(settings: Settings, cohort: Cohort, splits: Splits) -> dict[str, Record]:
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
            difference = name_difference(
                record.made_with, describe(settings, parts[subject], cohort.subjects[subject])
            )
        if difference:
            raise UserError(f"{settings.output_dir} holds {subject}, {difference}: {BEGIN_ANEW}")
    return finished


def describe(settings: Settings, part: str, subject: Subject) -> dict:
    """All that a subject's slices depend on, in JSON's types."""
    from datasets.volumes import checksum

    return {
        "split": part,
        "modality": ",".join(sorted(settings.modalities)),  # their order changes nothing
        "slices": f"{settings.start} {settings.stop}",
        "percentage_lower": settings.percentage_lower,
        "percentage_upper": settings.percentage_upper,
        "volumes": {kind: checksum(subject.volumes[kind]) for kind in kinds_read(settings, subject)},
    }


def name_difference(made_with: dict, asked_for: dict) -> str:
    """The first thing in which two descriptions of a subject differ, as a clause; empty where they agree."""
    for key, now in asked_for.items():
        before = made_with.get(key)
        if before != now:
            if key == "volumes":
                before = before if isinstance(before, dict) else {}
                kinds = [kind for kind in now | before if before.get(kind) != now.get(kind)]
                return f"made from another {' and '.join(kinds)} than the data have of it now"
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


def cut_subject(settings: Settings, part: str, subject: Subject) -> tuple[dict, dict[str, np.ndarray]]:
    """Normalise the subject's volumes and choose its slices.

    Returns:
        What the slices depend on, as in `describe`, with the grid that they lie on; and images [H, W] by
        `{kind}/{subject}_{kind}_{slice}.npy`, one kind after the other: float32 for modalities, uint8 for seg and
        brainmask.

    Raises:
        UserError: a volume cannot be read or normalised, or does not fit the others; the message names the file.
    """
    import numpy as np

    made_with = describe(settings, part, subject)
    window = slice(settings.start, settings.stop)
    stacks = {}  # by kind: [H, W, stop - start]
    first = None  # where the voxels of all the subject's volumes lie: on the grid of the first that is read
    given = None  # [H, W, D], where the data say what is brain
    if "brainmask" in subject.volumes:
        given, first = read_mask(settings, subject.volumes["brainmask"], first)
    brain = False  # [H, W, D]
    # On a grid of its own, a subject looks the same in whatever order the modalities are asked for.
    for modality in settings.modalities if settings.on_one_grid else sorted(settings.modalities):
        path = subject.volumes[modality]
        volume, first = read_scan(settings, path, first)
        if given is not None:
            volume = np.where(given, volume, 0)
        try:
            image = normalise(volume, settings.percentage_lower, settings.percentage_upper)
        except ValueError as error:
            raise UserError(f"{path} cannot be normalised, {error}") from error
        stacks[modality] = image[:, :, window].copy()  # a view would keep the whole volume in memory
        brain = brain | (volume != 0)
    if given is not None:
        brain = given > 0
    stacks["brainmask"] = brain[:, :, window].astype("uint8")
    stacks["seg"] = read_lesions(settings, subject, first, brain)[:, :, window]

    chosen = choose_slices(part, stacks["seg"], stacks["brainmask"])
    return made_with | {"grid": describe_grid(settings, first)}, {
        f"{kind}/{subject.name}_{kind}_{settings.start + index}.npy": stack[:, :, index].copy()
        for kind, stack in stacks.items()
        for index in chosen
    }


def read_scan(settings: Settings, path: Path, first: Grid | None) -> tuple[np.ndarray, Grid]:
    """A modality's intensities [H, W, D] on the subject's grid, that of its first volume if there is one.

    Raises:
        UserError: it cannot be read, or does not fit the grid.
    """
    from datasets.grid import move_scan
    from datasets.volumes import read_volume

    volume, own = read_volume(path)
    first = find_place(settings, volume, own, first)
    return volume if settings.on_one_grid else move_scan(volume, own.affine, first), first


def read_mask(settings: Settings, path: Path, first: Grid | None) -> tuple[np.ndarray, Grid]:
    """As `read_scan` for labels, uint8.

    Raises:
        UserError: as `read_scan`; or there are other labels than the data set knows, or none on the grid.
    """
    import numpy as np

    from datasets.grid import move
    from datasets.volumes import read_volume

    labels, own = read_volume(path)
    first = find_place(settings, labels, own, first)
    tumour = labels[labels != 0]  # few of all voxels, which makes the search among them quick
    unknown = tumour[~np.isin(tumour, range(settings.highest_label + 1))]
    if unknown.size:
        highest = settings.highest_label
        raise UserError(
            f"{path} must hold labels, whole numbers from 0 to {highest}, but holds {unknown[0]:g}"
        )
    labels = labels.astype("uint8")
    if settings.on_one_grid:
        return labels, first
    moved = move(labels, own.affine, first, order=0)
    if labels.any() and not moved.any():
        raise UserError(f"{path} lies elsewhere in space than {first.path.name}, nothing of it is left")
    return moved, first


def find_place(settings: Settings, volume: np.ndarray, own: Grid, first: Grid | None) -> Grid:
    """The grid that a volume is to lie on with the others of its subject, of which `first` is the first one's.

    Raises:
        UserError: data on one grid with too few slices, or with another shape or affine than the first; or other data
            that cannot be put on one.
    """
    import numpy as np

    if settings.on_one_grid:
        first = first or own
        if own.shape != first.shape:
            raise UserError(f"{own.path} has shape {own.shape}, but {first.path.name} has {first.shape}")
        if not np.allclose(own.affine, first.affine, atol=1e-3):  # mm; header fields are rounded to float32
            raise UserError(
                f"{own.path} lies elsewhere in space than {first.path.name}, their affines differ"
            )
        if own.shape[2] < settings.stop:
            raise too_shallow(settings, own.path, own.shape[2])
        return first
    return first or place_like_brats(volume != 0, own)


def place_like_brats(brain: np.ndarray, own: Grid) -> Grid:
    """Where a scan with this brain, bool [I, J, K], is to lie: [240, 240, 155], the brain in the middle.

    One of just as many voxels of this size keeps them: such a scan is one of BraTS, whatever its orientation.
    """
    from datasets.grid import TrainingGrid, find_field

    try:
        field, outside = find_field(TrainingGrid(), brain, own.affine)
        if field.shape[2] != DEPTH or sorted(own.shape) != sorted(field.shape):
            field, outside = find_field(TrainingGrid(), brain, own.affine, DEPTH)
        if outside > MOST_OUTSIDE:
            raise ValueError(f"{outside:.0%} of its brain would lie outside")
    except ValueError as error:
        raise UserError(f"{own.path} cannot be put on the grid of BraTS, {error}") from error
    return own._replace(shape=field.shape, affine=field.affine)


def read_lesions(settings: Settings, subject: Subject, first: Grid, brain: np.ndarray) -> np.ndarray:
    """The subject's labels, uint8 [H, W, D]; zeros where it has none and is declared healthy.

    Raises:
        UserError: as `read_mask`; or there is a lesion in somebody healthy, or one that lies outside the brain, as
            that of another scan does once both are put on the grid.
    """
    import numpy as np

    if "seg" not in subject.volumes:
        return np.zeros(first.shape, np.uint8)
    path = subject.volumes["seg"]
    labels, _ = read_mask(settings, path, first)
    if subject.healthy and labels.any():
        raise UserError(f"{path} holds a lesion, but {subject.name} is declared healthy")
    if not settings.on_one_grid and labels.any() and not labels[brain].any():
        raise UserError(f"{path} holds a lesion, but none of it lies in the brain of {first.path.name}")
    return labels


def describe_grid(settings: Settings, first: Grid) -> dict | None:
    """The grid that a subject's slices lie on, in JSON's types; None where its affine makes no sense of one."""
    from nibabel.orientations import aff2axcodes

    from datasets.grid import TrainingGrid

    if not settings.on_one_grid:
        return TrainingGrid().to_json()
    if None in aff2axcodes(first.affine):
        return None
    return TrainingGrid.of_volume(first.affine, first.shape).to_json()


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
                    failures[subject.name] = f"{error}; {subject.name} is left out: {MEND}"
                except MemoryError:
                    reason = f"{subject.name} needs more memory than there is: try fewer --workers"
                    failures[subject.name] = reason
                else:
                    made[subject.name] = store(settings.output_dir, part, subject.name, made_with, slices)
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
    settings: Settings, cohort: Cohort, splits: Splits, list_paths: dict[str, Path], n_finished: int
) -> None:
    """Say what is about to happen, in a few lines."""
    n_subjects = sum(len(subjects) for subjects in splits.values())
    n_on_disk = len(cohort.subjects) + len(cohort.excluded)
    if cohort.splits:
        origin = f"column split of {cohort.source}"
    elif not list_paths:
        origin = f"made and written to {settings.output_dir}"
    else:
        origin = ", ".join(str(path) for path in list_paths.values())
        origin += "" if "val" in list_paths else "; validation hashed out of training"
    print(f"{n_subjects} of {n_on_disk} subjects in {cohort.source}, slices to {settings.output_dir}")
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


def name_a_few(names: Sequence[str], limit: int = 5) -> str:
    """`a, b, c` or, beyond the limit, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    run(main)
