"""Split the subjects of a BraTS folder into training, validation and testing lists by a hash of their names.

python ./datasets/split_traintest.py --data_dir DIR --output_dir DIR
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python ./datasets/X.py`

from datasets.cohorts import BRATS_DIR, read_brats
from datasets.splits import LIST_NAMES, Splits, read_list, split_subjects, write_lists
from utils.cli import ArgumentParser, UserError, run


def main() -> None:
    args = parse_args()
    splits = split_subjects(read_brats(args.data_dir).subjects, args.seed)
    refuse_to_replace(splits, args.output_dir)
    write_lists(splits, args.output_dir)
    for split, subjects in splits.items():
        print(f"{split}: {len(subjects)} subjects in {args.output_dir / LIST_NAMES[split]}")


def parse_args() -> Namespace:
    parser = ArgumentParser(description="Split the subjects of a BraTS folder into training, validation and testing.")
    parser.add_argument("--data_dir", type=Path, default=BRATS_DIR, help="BraTS folder, with one folder per subject")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("datasets"),
        help="folder for the three lists; brats_preprocess.py looks for them in its data_dir and in ./datasets",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the hash")
    return parser.parse_args()


def refuse_to_replace(splits: Splits, output_dir: Path) -> None:
    """Raise a UserError if `output_dir` has a list with other subjects, which may be published or in use."""
    for split, subjects in splits.items():
        path = output_dir / LIST_NAMES[split]
        if path.exists() and read_list(path) != subjects:
            raise UserError(f"{path} already lists other subjects: move it away or choose another --output_dir")


if __name__ == "__main__":
    run(main)
