"""Split the subjects of a BraTS folder into training, validation and testing lists.

    python ./datasets/split_traintest.py --data_dir DIR --output_dir DIR

A subject's part depends on nothing but its name and the seed: a hash of the two gives it a place in [0, 1),
and the parts are intervals there (78, 11 and 11 %). So one subject more moves no other.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.cohorts import BRATS_DIR, read_brats
from utils.cli import ArgumentParser, UserError, run

Splits = dict[str, list[str]]  # subjects by part: train, val, test
LIST_NAMES = {
    "train": "brats_split_training.txt",
    "val": "brats_split_validation.txt",
    "test": "brats_split_testing.txt",
}
INTERVALS = {"train": (0.0, 0.78), "val": (0.78, 0.89), "test": (0.89, 1.0)}


def main() -> None:
    args = parse_args()
    splits = split_subjects(read_brats(args.data_dir).subjects, args.seed)
    refuse_to_replace(splits, args.output_dir)
    write_lists(splits, args.output_dir)
    for part, subjects in splits.items():
        print(f"{part}: {len(subjects)} subjects in {args.output_dir / LIST_NAMES[part]}")


def parse_args() -> Namespace:
    parser = ArgumentParser(
        description="Split the subjects of a BraTS folder into training, validation and testing."
    )
    parser.add_argument(
        "--data_dir", type=Path, default=BRATS_DIR, help="folder with one folder for each subject"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("datasets"),
        help="where the three lists go; brats_preprocess.py looks for them in its data_dir and in ./datasets",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another split")
    return parser.parse_args()


def split_subjects(subjects: Iterable[str], seed: int = 0) -> Splits:
    """Sorted subjects for each of train, val and test: about 78, 11 and 11 % of them, and no part empty.

    A part that the hash leaves empty (as happens with few subjects) takes, from the part that then has the most,
    the subject whose hash lies nearest. Only such a subject can move when subjects are added.

    Raises:
        UserError: fewer than three subjects.
    """
    places = {subject: hash_to_unit(subject, seed) for subject in sorted(subjects)}
    if len(places) < len(INTERVALS):
        raise UserError(f"a split takes 3 subjects or more, not {len(places)}: write lists by hand instead")
    splits = {
        part: [subject for subject, place in places.items() if low <= place < high]
        for part, (low, high) in INTERVALS.items()
    }
    for part, (low, high) in INTERVALS.items():
        if not splits[part]:
            donor = max(splits.values(), key=len)
            nearest = min(donor, key=lambda subject: abs(places[subject] - (low + high) / 2))
            donor.remove(nearest)
            splits[part].append(nearest)
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
    """The subjects in a text file with one name a line; blank lines and repetitions are passed over.

    Raises:
        UserError: the file is not there or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the split list {path} cannot be read: {error}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def write_lists(splits: Splits, output_dir: Path) -> None:
    """Write the list file of each part into `output_dir`, which is made where it is not there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for part, subjects in splits.items():
            (output_dir / LIST_NAMES[part]).write_text(
                "".join(f"{subject}\n" for subject in subjects), encoding="utf-8"
            )
    except OSError as error:
        raise UserError(f"the split lists cannot be written to {output_dir}: {error}") from error


def refuse_to_replace(splits: Splits, output_dir: Path) -> None:
    """Raise a UserError where a list in `output_dir` differs: it may be a published one, or one in use."""
    for part, subjects in splits.items():
        path = output_dir / LIST_NAMES[part]
        if path.exists() and read_list(path) != subjects:
            raise UserError(f"{path} holds other subjects already: move it away or name another --output_dir")


if __name__ == "__main__":
    run(main)
