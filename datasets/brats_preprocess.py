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
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.cohorts import BRATS_DIR, Cohort, Subject, read_brats, read_table, require_known
from datasets.records import NORMALISATION, Record, find_finished, find_leftovers, prepare, store
from datasets.splits import LIST_NAMES, Splits, choose_splits, find_lists, write_lists
from utils.cli import ArgumentParser, UserError, run
from utils.files import locked
from utils.processes import in_processes

if TYPE_CHECKING:  # it imports what reads volumes, for which `--help` and a mistyped flag need not wait
    from datasets.subject import Cut, Settings

BRATS_MODALITIES = ("t2", "flair", "t1")

Job = tuple[str, Subject]  # with its split


def main() -> None:
    args = parse_args()
    from datasets.subject import Settings, check_subjects

    cohort = read_table(args.csv) if args.csv else read_brats(args.data_dir or BRATS_DIR)
    modalities = args.modality or (cohort.modalities if args.csv else BRATS_MODALITIES)
    require_known(modalities, cohort)
    quantiles = (args.percentage_lower, args.percentage_upper)
    data = (cohort.highest_label, cohort.on_one_grid)
    settings = Settings(args.output_dir, modalities, *quantiles, *args.slices, *data)

    named = {split: getattr(args, f"{split}_split") for split in LIST_NAMES if f"{split}_split" in args}
    list_paths = find_lists(cohort.list_folders) | named
    splits = choose_splits(cohort, list_paths)
    split_of = {name: split for split, names in splits.items() for name in names}
    check_subjects(settings, cohort, split_of)

    def description(name: str) -> dict | None:
        return settings.describe(split_of[name], cohort.subjects[name]) if name in split_of else None

    with locked(args.output_dir, "--output_dir", "name another --output_dir"):
        finished = {} if args.overwrite else find_finished(args.output_dir, description)
        leftovers = find_leftovers(args.output_dir, splits, settings.kinds, finished, args.overwrite)
        prepare(args.output_dir, finished, leftovers, splits, settings.kinds)
        if not list_paths and not cohort.splits:
            write_lists(splits, args.output_dir)
        print_plan(args.output_dir, cohort, splits, list_paths, len(finished))
        jobs = [(split, cohort.subjects[name]) for name, split in split_of.items() if name not in finished]
        made, cuts, failures = preprocess(settings, jobs, args.workers)
    print_summary(settings, splits, finished, made, failures)
    print_doubts(settings, cuts)
    if cohort.excluded:
        told = f"{len(cohort.excluded)} ({name_a_few(cohort.excluded)})"
        print(f"left out, neither a seg nor healthy=yes: {told}")
    for reason in sorted(failures.values()):
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(1 if failures else 0)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Turn the raw volumes of BraTS, or of any data set, into normalised 2D slices.")
    add = parser.add_argument
    of_brats = f"(default: {','.join(BRATS_MODALITIES)}; with --csv all of the table)"
    add("--modality", type=comma_list, help=f"modalities, separated by commas {of_brats}")
    add("--data_dir", type=Path, help=f"folder of BraTS, a folder for each subject in it (default: {BRATS_DIR})")
    add("--csv", type=Path, help="table of any other data set, a row for each subject, instead of --data_dir")
    add("--output_dir", type=Path, default=Path("datasets/data"), help="where the slices go")
    for (name, quantile), value in zip(NORMALISATION.items(), ("-3", "+3"), strict=True):
        help_text = f"quantile of the brain's voxels that becomes {value}"
        add(f"--{name}", type=float, default=quantile, help=help_text)
    for split, name in LIST_NAMES.items():
        otherwise = "hashed out of training" if split == "val" else "made by split_traintest.py"
        places = f"(default: {name} in data_dir or ./datasets; the column split of --csv; else {otherwise})"
        help_text = f"list of subjects, one a line {places}"
        add(f"--{split}_split", type=Path, default=argparse.SUPPRESS, help=help_text)
    add(
        "--slices",
        type=int,
        nargs=2,
        metavar=("START", "STOP"),
        default=[70, 90],
        help="range of axial slices, counted from 0, START included and STOP not",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="subjects at a time (default: all cores)")
    add("--overwrite", action="store_true", help="start over: remove all slices of earlier runs in output_dir")
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


def preprocess(
    settings: Settings, jobs: list[Job], workers: int
) -> tuple[dict[str, Record], dict[str, Cut], dict[str, str]]:
    """Make subjects, `workers` at a time; returns records and cuts of those made, and why the others were not.

    The cuts have given their slices away.

    Workers read and calculate, and this process writes: when it is killed, nobody writes any more.
    """
    from datasets.subject import cut_subject

    made, cuts, failures = {}, {}, {}
    arguments = [(settings, *job) for job in jobs]
    for (_, split, subject), future in in_processes(cut_subject, arguments, workers, unit="subject", disable=None):
        try:
            cut = future.result()
        except UserError as error:
            mend = "replace the file and run the same command again"
            failures[subject.name] = f"{error}; {subject.name} is left out: {mend}"
        except MemoryError:
            failures[subject.name] = f"{subject.name} needs more memory than there is: try fewer --workers"
        else:
            made[subject.name] = store(settings.output_dir, split, subject.name, cut.made_with, cut.slices)
            cuts[subject.name] = cut._replace(slices={})
    return made, cuts, failures


def print_plan(
    output_dir: Path, cohort: Cohort, splits: Splits, list_paths: Mapping[str, Path], n_finished: int
) -> None:
    """Say what is about to happen, in a few lines."""
    n_subjects = sum(map(len, splits.values()))
    n_on_disk = len(cohort.subjects) + len(cohort.excluded)
    origin = f"column split of {cohort.source}" if cohort.splits else f"made and written to {output_dir}"
    if list_paths:
        origin = ", ".join(map(str, list_paths.values()))
        origin += "" if "val" in list_paths else "; validation hashed out of training"
    print(f"{n_subjects} of {n_on_disk} subjects in {cohort.source}, slices to {output_dir}")
    print(f"split lists: {origin}", flush=True)
    if n_finished:
        print(f"there already: {n_finished} of {n_subjects} subjects", flush=True)


def print_summary(
    settings: Settings, splits: Splits, finished: dict[str, Record], made: dict[str, Record], failures: dict[str, str]
) -> None:
    """Print what was there, read and written, and who was left out and why."""
    for split, subjects in splits.items():
        n_there = sum(subject in finished for subject in subjects)
        files = [name for subject in subjects if subject in made for name in made[subject].files]
        n_slices = sum("/seg/" in name for name in files)
        there = f", subjects there already: {n_there}" if n_there else ""
        print(f"{split}: subjects read: {len(subjects) - n_there}, slices written: {n_slices}{there}")
    records = finished | made
    for split, subjects in splits.items():
        lacking = "no tumour-free slice" if split == "train" else "no tumour"
        empty = [subject for subject in subjects if subject in records and not records[subject].files]
        bad = [subject for subject in subjects if subject in failures]
        where = f"{lacking} in slices {settings.start} to {settings.stop - 1}"
        for reason, left_out in ((where, empty), ("bad volumes", bad)):
            if left_out:
                print(f"{split}: left out, {reason}: {len(left_out)} ({name_a_few(left_out)})")


def print_doubts(settings: Settings, cuts: Mapping[str, Cut]) -> None:
    """Print what may be wrong with subjects that were made, and which slices those need that none was taken of."""
    nearest = [cut.nearest for cut in cuts.values() if cut.nearest is not None]
    if nearest:
        start, stop = min(settings.start, *nearest), max(settings.stop, *(i + 1 for i in nearest))
        print(f"--slices {start} {stop} would take slices of {len(nearest)} of those left out")
    for doubt in sorted({doubt for cut in cuts.values() for doubt in cut.doubts}):
        subjects = sorted(name for name, cut in cuts.items() if doubt in cut.doubts)
        print(f"warning: {doubt}: {len(subjects)} ({name_a_few(subjects)}); check that this is right")


def name_a_few(names: Sequence[str], limit: int = 5) -> str:
    """`a, b, c` or, beyond the limit, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    run(main)
