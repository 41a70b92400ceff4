"""Measured points in a CSV file: a benchmark that was interrupted reads them and adds what is missing."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli import UserError

Row = dict[str, float | None]  # what was measured at a point, by column; None where it is undefined


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
