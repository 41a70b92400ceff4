"""What benchmarks that train and measure share: both resume where they were interrupted.

A training is an ordinary experiment. Measured points lie in a CSV file, and a second run adds what is missing.
"""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from utils.cli import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

Row = dict[str, float | None]  # what was measured at a point, by column; None where it is undefined


def run_training(what: str, *flags: str, one_thread: bool) -> None:
    """Run modality_cyclic_train.py to its end; a training that has ended already is left as it is.

    A UserError that says what failed, with the last line of its stderr.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    command = [sys.executable, REPOSITORY / "modality_cyclic_train.py", *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"{what}: {ended.stderr.strip().splitlines()[-1]}")


def read_points(path: Path, kind: type, columns: Sequence[str]) -> dict[Any, Row]:
    """What was measured before, by point; nothing where there is no file.

    Args:
        path: of the CSV.
        kind: of a point, a NamedTuple of strings and ints.
        columns: what is measured at each.

    Raises:
        UserError: the file holds other columns.
    """
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*kind._fields, *columns):
            raise UserError(f"{path} is not of this benchmark, or of another version: move it away")
        return {
            kind(*(of(row[name]) for name, of in kind.__annotations__.items())): {
                name: float(row[name]) if row[name] else None for name in columns
            }
            for row in reader
        }


def write_points(path: Path, kind: type, columns: Sequence[str], rows: Mapping[Any, Row]) -> None:
    """All points, one a row, with 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*kind._fields, *columns))
        for point, row in rows.items():
            writer.writerow((*point, *("" if row[name] is None else f"{row[name]:.6g}" for name in columns)))


def over_seeds(values: list[float]) -> str:
    """The mean, and the range where there is more than one."""
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} … {max(values):.3f})"
