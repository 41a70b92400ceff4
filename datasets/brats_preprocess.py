"""Turn raw volumes into normalised 2D slices for training, validation and testing.

    python ./datasets/brats_preprocess.py --data_dir DIR --output_dir OUT
    python ./datasets/brats_preprocess.py --csv TABLE.csv --output_dir OUT

The first command reads a BraTS folder, the second any data set described by a table (see datasets/cohorts.py). BraTS
keeps its own grid; every subject of another data set is resampled onto the BraTS grid, so that a slice number means the
same height in all brains.

Writes OUT/{train,val,test}/{modality…,seg,brainmask}/{subject}_{kind}_{slice}.npy: float32 images, uint8 segmentations
with their original labels, uint8 brain masks. Training gets every tumour-free slice in the requested range; validation
and testing get, for each subject, the slice with the largest tumour, or with `--test_slices all` every slice that shows
brain.

A subject is written completely or not at all. Running the same command again adds the missing subjects and leaves the
others alone. A subject that cannot be read is left out and reported at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.cohorts import BRATS_DIR, Cohort, Subject, read_brats, read_table, require_modalities
from datasets.records import (
    NORMALISATION,
    TEST_SLICES,
    Record,
    find_finished,
    find_stale_slices,
    prepare_output_dir,
    store,
)
from datasets.splits import LIST_NAMES, Splits, choose_splits, find_lists, write_lists
from utils.cli import ArgumentParser, UserError, run
from utils.files import locked
from utils.processes import in_processes

if TYPE_CHECKING:  # imports nibabel, which is too slow for `--help` and mistyped flags
    from datasets.subject import Settings, SubjectSlices

BRATS_MODALITIES = ("t2", "flair", "t1")

Job = tuple[str, Subject]  # split, subject


def main() -> None:
    args = parse_args()
    from datasets.subject import Settings, check_subjects

    cohort = read_table(args.csv) if args.csv else read_brats(args.data_dir or BRATS_DIR)
    modalities = args.modality or (cohort.modalities if args.csv else BRATS_MODALITIES)
    require_modalities(modalities, cohort)
    quantiles = (args.percentage_lower, args.percentage_upper)
    labels_and_grid = (cohort.max_label, cohort.shared_grid)
    settings = Settings(args.output_dir, modalities, *quantiles, *args.slices, *labels_and_grid, args.test_slices)

    given = {split: getattr(args, f"{split}_split") for split in LIST_NAMES if f"{split}_split" in args}
    list_paths = find_lists(cohort.list_folders) | given
    splits = choose_splits(cohort, list_paths)
    split_of = {name: split for split, names in splits.items() for name in names}
    check_subjects(settings, cohort, split_of)

    def description(name: str) -> dict | None:
        return settings.describe(split_of[name], cohort.subjects[name]) if name in split_of else None

    with locked(args.output_dir, "--output_dir", "choose another --output_dir"):
        finished = {} if args.overwrite else find_finished(args.output_dir, description)
        stale = find_stale_slices(args.output_dir, splits, settings.kinds, finished, args.overwrite)
        prepare_output_dir(args.output_dir, finished, stale, splits, settings.kinds)
        if not list_paths and not cohort.splits:
            write_lists(splits, args.output_dir)
        print_plan(args.output_dir, cohort, splits, list_paths, len(finished))
        jobs = [(split, cohort.subjects[name]) for name, split in split_of.items() if name not in finished]
        made, outputs, failures = preprocess(settings, jobs, args.workers)
    print_summary(settings, splits, finished, made, failures)
    print_quality_warnings(settings, outputs)
    if cohort.excluded:
        print(f"left out, neither a seg nor healthy=yes: {len(cohort.excluded)} ({abbreviate(cohort.excluded)})")
    for reason in sorted(failures.values()):
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(1 if failures else 0)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Turn raw volumes of BraTS, or of another data set, into normalised 2D slices.")
    add = parser.add_argument
    defaults = f"(default: {','.join(BRATS_MODALITIES)}; with --csv, all modalities of the table)"
    add("--modality", type=comma_list, help=f"modalities, separated by commas {defaults}")
    add("--data_dir", type=Path, help=f"BraTS folder, with one folder per subject (default: {BRATS_DIR})")
    add("--csv", type=Path, help="table of another data set, one row per subject; replaces --data_dir")
    add("--output_dir", type=Path, default=Path("datasets/data"), help="folder for the slices")
    for (name, quantile), value in zip(NORMALISATION.items(), ("-3", "+3"), strict=True):
        add(f"--{name}", type=float, default=quantile, help=f"quantile of the brain's voxels that is mapped to {value}")
    for split, name in LIST_NAMES.items():
        otherwise = "split off from training by hash" if split == "val" else "made by split_traintest.py"
        default = f"(default: {name} in data_dir or ./datasets, or the split column of --csv; else {otherwise})"
        help_text = f"list of subjects, one per line {default}"
        add(f"--{split}_split", type=Path, default=argparse.SUPPRESS, help=help_text)
    add(
        "--slices",
        type=int,
        nargs=2,
        metavar=("START", "STOP"),
        default=[70, 90],
        help="axial slices START to STOP - 1, counted from 0",
    )
    kept = "slices of val and test subjects: the one with the largest tumour, or all that show brain, tumour or not"
    add("--test_slices", choices=TEST_SLICES, default=TEST_SLICES[0], help=kept)
    add("--workers", type=int, default=os.cpu_count() or 1, help="subjects at a time, by default one per core")
    add("--overwrite", action="store_true", help="start over: delete the slices of all earlier runs in output_dir")
    args = parser.parse_args()

    if args.csv and args.data_dir:
        parser.error("--csv and --data_dir both name the input data: pass only one of them")
    if not 0 <= args.percentage_lower < args.percentage_upper <= 1:
        parser.error(
            "percentages must satisfy 0 <= lower < upper <= 1, "
            f"not {args.percentage_lower:g} and {args.percentage_upper:g}"
        )
    if not 0 <= args.slices[0] < args.slices[1]:
        parser.error(f"--slices must satisfy 0 <= START < STOP, not {args.slices[0]} and {args.slices[1]}")
    if args.workers < 1:
        parser.error(f"--workers must be 1 or more, not {args.workers}")
    return args


def comma_list(text: str) -> tuple[str, ...]:
    """Return `("t2", "flair")` for "t2, flair", without duplicates."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def preprocess(
    settings: Settings, jobs: list[Job], workers: int
) -> tuple[dict[str, Record], dict[str, SubjectSlices], dict[str, str]]:
    """Slice subjects, `workers` at a time, and store them.

    Only this process writes to disk, so that nothing is written after it is killed.

    Returns:
        By subject: the stored records, the outputs without their slices, and the reasons of failures.
    """
    from datasets.subject import slice_subject

    made, outputs, failures = {}, {}, {}
    arguments = [(settings, *job) for job in jobs]
    for (_, split, subject), future in in_processes(slice_subject, arguments, workers, unit="subject", disable=None):
        try:
            output = future.result()
        except UserError as error:
            remedy = "replace the file and run the same command again"
            failures[subject.name] = f"{error}; {subject.name} is left out: {remedy}"
        except MemoryError:
            failures[subject.name] = f"not enough memory for {subject.name}: use fewer --workers"
        else:
            made[subject.name] = store(settings.output_dir, split, subject.name, output.made_with, output.slices)
            outputs[subject.name] = output._replace(slices={})
    return made, outputs, failures


def print_plan(
    output_dir: Path, cohort: Cohort, splits: Splits, list_paths: Mapping[str, Path], n_finished: int
) -> None:
    """Print the inputs and the output of the run."""
    n_subjects = sum(map(len, splits.values()))
    n_on_disk = len(cohort.subjects) + len(cohort.excluded)
    origin = f"split column of {cohort.source}" if cohort.splits else f"made and written to {output_dir}"
    if list_paths:
        origin = ", ".join(map(str, list_paths.values()))
        origin += "" if "val" in list_paths else "; validation split off from training by hash"
    print(f"{n_subjects} of {n_on_disk} subjects in {cohort.source}, slices to {output_dir}")
    print(f"split lists: {origin}", flush=True)
    if n_finished:
        print(f"already preprocessed: {n_finished} of {n_subjects} subjects", flush=True)


def print_summary(
    settings: Settings, splits: Splits, finished: dict[str, Record], made: dict[str, Record], failures: dict[str, str]
) -> None:
    """Print how many subjects were read and slices written in each split, and which subjects were left out."""
    for split, subjects in splits.items():
        n_finished = sum(subject in finished for subject in subjects)
        files = [name for subject in subjects if subject in made for name in made[subject].files]
        n_slices = sum("/seg/" in name for name in files)
        earlier = f", subjects already preprocessed: {n_finished}" if n_finished else ""
        print(f"{split}: subjects read: {len(subjects) - n_finished}, slices written: {n_slices}{earlier}")
    records, without_tumour = finished | made, False
    for split, subjects in splits.items():
        missing = "no brain" if settings.test_slices == "all" else "no tumour"
        missing = "no tumour-free slice" if split == "train" else missing
        empty = [subject for subject in subjects if subject in records and not records[subject].files]
        bad = [subject for subject in subjects if subject in failures]
        reason_empty = f"{missing} in slices {settings.start} to {settings.stop - 1}"
        for reason, left_out in ((reason_empty, empty), ("bad volumes", bad)):
            if left_out:
                print(f"{split}: left out, {reason}: {len(left_out)} ({abbreviate(left_out)})")
        if split != "train" and settings.test_slices == "largest":
            healthy = any(records[subject].made_with.get("lesion") is False for subject in empty)
            without_tumour |= healthy or 0 < len(empty) == len(records.keys() & set(subjects))
    if without_tumour:
        print("--test_slices all keeps val and test subjects without a tumour, healthy ones included")


def print_quality_warnings(settings: Settings, outputs: Mapping[str, SubjectSlices]) -> None:
    """Print the range of slices that would include the subjects left out, and the warnings about the others."""
    nearest = [output.nearest for output in outputs.values() if output.nearest is not None]
    if nearest:
        start, stop = min(settings.start, *nearest), max(settings.stop, *(i + 1 for i in nearest))
        print(f"--slices {start} {stop} would include {len(nearest)} of the subjects left out")
    for warning in sorted({warning for output in outputs.values() for warning in output.warnings}):
        subjects = sorted(name for name, output in outputs.items() if warning in output.warnings)
        print(f"warning: {warning}: {len(subjects)} ({abbreviate(subjects)}); check these volumes")


def abbreviate(names: Sequence[str], limit: int = 5) -> str:
    """Return `a, b, c` or, beyond the limit, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    run(main)
