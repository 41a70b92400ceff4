"""Training, validation and test splits: defined by the data set, by lists of subjects, or by a hash of their names."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets.cohorts import Cohort
from utils.cli import UserError
from utils.files import write_atomically, writing

Splits = dict[str, list[str]]  # subjects by split: train, val, test
LIST_NAMES = {
    "train": "brats_split_training.txt",
    "val": "brats_split_validation.txt",
    "test": "brats_split_testing.txt",
}
INTERVALS = {"train": (0.0, 0.78), "val": (0.78, 0.89), "test": (0.89, 1.0)}


def choose_splits(cohort: Cohort, list_paths: Mapping[str, Path]) -> Splits:
    """Return the data set's own splits, else those of the lists, else a split by hash.

    Raises:
        UserError: if both the data set and lists define splits, or as in `read_splits` and `split_subjects`.
    """
    if cohort.splits and list_paths:
        path = next(iter(list_paths.values()))
        raise UserError(f"both the split column of {cohort.source} and {path} define splits: remove one of them")
    if cohort.splits:
        return cohort.splits
    return read_splits(list_paths, cohort) if list_paths else split_subjects(cohort.subjects)


def find_lists(folders: Iterable[Path]) -> dict[str, Path]:
    """Return the split lists of the first folder that has any, by split, without mixing folders."""
    for folder in folders:
        found = {split: folder / name for split, name in LIST_NAMES.items() if (folder / name).exists()}
        if found:
            return found
    return {}


def read_splits(list_paths: Mapping[str, Path], cohort: Cohort) -> Splits:
    """Read the split lists. Without a validation list, split validation off from training by hash.

    Raises:
        UserError: if there is no training or testing list, a subject is not on disk or in two lists, or all are empty.
    """
    for split in ("train", "test"):
        if split not in list_paths:
            found = next(iter(list_paths.values()))
            raise UserError(f"found {found}, but no {LIST_NAMES[split]}: pass it as --{split}_split, it may be empty")
    listed = {split: read_list(path) for split, path in list_paths.items()}
    listed_in: dict[str, Path] = {}
    for split, names in listed.items():
        for name in names:
            if name not in cohort.subjects and name not in cohort.excluded:
                raise UserError(f"{list_paths[split]} lists {name}, which {cohort.source} does not have")
            if name in listed_in:
                raise UserError(f"{name} is both in {listed_in[name]} and in {list_paths[split]}: remove it from one")
            listed_in[name] = list_paths[split]
    if not listed_in:
        raise UserError("the split lists are all empty: add at least one subject")
    listed = {split: [name for name in names if name in cohort.subjects] for split, names in listed.items()}
    if "val" not in listed:
        listed["train"], listed["val"] = split_off_validation(listed["train"])
    return {split: listed[split] for split in LIST_NAMES}


def split_subjects(subjects: Iterable[str], seed: int = 0) -> Splits:
    """Split subjects into sorted train, val and test lists of about 78, 11 and 11 %, none of them empty.

    A subject's split depends only on its name and the seed, whose hash in [0, 1) falls into the interval of a split.
    Adding a subject therefore moves no other. With few subjects, a split that is empty takes the subject with the
    closest hash from the largest split; only such a subject can move when others are added.

    Raises:
        UserError: for fewer than three subjects.
    """
    hashes = {subject: hash_to_unit_interval(subject, seed) for subject in sorted(subjects)}
    if len(hashes) < len(INTERVALS):
        raise UserError(f"splitting takes 3 subjects or more, not {len(hashes)}: write the lists by hand instead")
    splits = {
        split: [subject for subject, value in hashes.items() if low <= value < high]
        for split, (low, high) in INTERVALS.items()
    }
    for split, (low, high) in INTERVALS.items():
        if not splits[split]:
            donor = max(splits.values(), key=len)
            nearest = min(donor, key=lambda subject: abs(hashes[subject] - (low + high) / 2))
            donor.remove(nearest)
            splits[split].append(nearest)
    return splits


def split_off_validation(training: Iterable[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Split a training list into training and validation by hash, both sorted, in the ratio of 78 to 11.

    Neither is empty if there are two subjects or more. A single subject stays in training.
    """
    # Salted, because the unsalted hashes of a training list from `split_subjects` are not uniform on [0, 1).
    hashes = {name: hash_to_unit_interval(f"validation:{name}", seed) for name in training}
    if len(hashes) < 2:
        return list(hashes), []
    ranked = sorted(hashes, key=hashes.get)
    border = INTERVALS["train"][1] / INTERVALS["val"][1]
    n_training = sum(value < border for value in hashes.values())
    n_training = min(max(n_training, 1), len(ranked) - 1)
    return sorted(ranked[:n_training]), sorted(ranked[n_training:])


def hash_to_unit_interval(name: str, seed: int) -> float:
    """Return a number in [0, 1), uniform over names and, unlike Python's `hash`, the same on every machine."""
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, so never rounded up to 1


def read_list(path: Path) -> list[str]:
    """Read a text file with one subject per line, skipping blank lines and duplicates.

    Raises:
        UserError: if the file is missing or not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"the split list {path} cannot be read: {error}{remedy}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def write_lists(splits: Splits, output_dir: Path) -> None:
    """Write the split lists into `output_dir`, creating it if needed; lists that are up to date are not rewritten."""
    with writing(output_dir, "--output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for split, subjects in splits.items():
            path = output_dir / LIST_NAMES[split]
            if not path.exists() or read_list(path) != subjects:
                write_atomically(path, "".join(f"{subject}\n" for subject in subjects))
