"""Which subject belongs to which split: by the data set itself, by lists of subjects, or by a hash of their names."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets.cohorts import Cohort
from utils.cli import UserError
from utils.files import write_whole, writing

Splits = dict[str, list[str]]  # subjects by split: train, val, test
LIST_NAMES = {
    "train": "brats_split_training.txt",
    "val": "brats_split_validation.txt",
    "test": "brats_split_testing.txt",
}
INTERVALS = {"train": (0.0, 0.78), "val": (0.78, 0.89), "test": (0.89, 1.0)}


def choose_splits(cohort: Cohort, list_paths: Mapping[str, Path]) -> Splits:
    """What the data set says itself, else what the lists say, else a split by hash.

    A UserError if both the data set and lists say it, or as from `read_splits` and `split_subjects`.
    """
    if cohort.splits and list_paths:
        raise UserError(
            f"both the column split of {cohort.source} and {next(iter(list_paths.values()))} say who is in which "
            "split: leave the column or the list out"
        )
    if cohort.splits:
        return cohort.splits
    return read_splits(list_paths, cohort) if list_paths else split_subjects(cohort.subjects)


def find_lists(folders: Iterable[Path]) -> dict[str, Path]:
    """The lists in the first folder that has any, by split; those of two folders are never mixed."""
    for folder in folders:
        found = {split: folder / name for split, name in LIST_NAMES.items() if (folder / name).exists()}
        if found:
            return found
    return {}


def read_splits(list_paths: Mapping[str, Path], cohort: Cohort) -> Splits:
    """Read the lists; validation is hashed out of training where it has none. A list may be empty, but not all.

    A UserError for no training or no testing list, a subject that is not on disk, or one that is in two lists.
    """
    for split in ("train", "test"):
        if split not in list_paths:
            there = next(iter(list_paths.values()))
            raise UserError(
                f"there is {there}, but no {LIST_NAMES[split]}: name one with --{split}_split, it may be empty"
            )
    listed = {split: read_list(path) for split, path in list_paths.items()}
    listed_in: dict[str, Path] = {}
    for split, names in listed.items():
        for name in names:
            if name not in cohort.subjects and name not in cohort.excluded:
                raise UserError(f"{list_paths[split]} lists {name}, of which {cohort.source} has no volumes")
            if name in listed_in:
                raise UserError(f"{name} is both in {listed_in[name]} and in {list_paths[split]}: take it out of one")
            listed_in[name] = list_paths[split]
    if not listed_in:
        raise UserError("the split lists are all empty: put at least one subject into one of them")
    listed = {split: [name for name in names if name in cohort.subjects] for split, names in listed.items()}
    if "val" not in listed:
        listed["train"], listed["val"] = hash_validation_out_of(listed["train"])
    return {split: listed[split] for split in LIST_NAMES}


def split_subjects(subjects: Iterable[str], seed: int = 0) -> Splits:
    """Sorted subjects for each of train, val and test: about 78, 11 and 11 % of them, and no split empty.

    A subject's split depends on nothing but its name and the seed: a hash of the two gives it a place in [0, 1), and
    the splits are intervals there. So one subject more moves no other. A split that the hash leaves empty (as happens
    with few subjects) takes, from the split that then has the most, the subject whose hash lies nearest. Only such a
    subject can move when subjects are added. A UserError for fewer than three subjects.
    """
    places = {subject: hash_to_unit(subject, seed) for subject in sorted(subjects)}
    if len(places) < len(INTERVALS):
        raise UserError(f"a split takes 3 subjects or more, not {len(places)}: write lists by hand instead")
    splits = {
        split: [subject for subject, place in places.items() if low <= place < high]
        for split, (low, high) in INTERVALS.items()
    }
    for split, (low, high) in INTERVALS.items():
        if not splits[split]:
            donor = max(splits.values(), key=len)
            nearest = min(donor, key=lambda subject: abs(places[subject] - (low + high) / 2))
            donor.remove(nearest)
            splits[split].append(nearest)
    return splits


def hash_validation_out_of(training: Iterable[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Divide a training list that has no validation list into the two, sorted, in the proportion of 78 to 11.

    With two subjects or more neither is empty: the one nearest to the border changes sides where one would be. A
    lone subject stays in training.
    """
    # A salt of its own: the places of a training list made by `split_subjects` are not uniform on [0, 1).
    places = {name: hash_to_unit(f"validation:{name}", seed) for name in training}
    if len(places) < 2:
        return list(places), []
    ranked = sorted(places, key=places.get)
    border = INTERVALS["train"][1] / INTERVALS["val"][1]
    n_training = sum(place < border for place in places.values())
    n_training = min(max(n_training, 1), len(ranked) - 1)
    return sorted(ranked[:n_training]), sorted(ranked[n_training:])


def hash_to_unit(name: str, seed: int) -> float:
    """A number in [0, 1), uniform over names, the same on every machine (which Python's own hash is not)."""
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, so never rounded up to 1


def read_list(path: Path) -> list[str]:
    """The subjects in a text file with one name a line; blank lines and repetitions are skipped.

    A UserError if the file is not there or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"the split list {path} cannot be read: {error}{remedy}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def write_lists(splits: Splits, output_dir: Path) -> None:
    """Write the list of each split into `output_dir`, which is made where it is not there.

    Lists that already say the same are left alone. A UserError if the folder cannot be made or written to.
    """
    with writing(output_dir, "--output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for split, subjects in splits.items():
            path = output_dir / LIST_NAMES[split]
            if not path.exists() or read_list(path) != subjects:
                write_whole(path, "".join(f"{subject}\n" for subject in subjects))
