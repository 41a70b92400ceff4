"""Measured points in a CSV file, so that an interrupted benchmark adds only the missing ones."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli import UserError

Row = dict[str, float | None]  # measured values of a point by column, None if undefined


def read_points(path: Path, kind: type, columns: Sequence[str]) -> dict[Any, Row]:
    """Return the rows of a CSV file by point, a NamedTuple `kind` of strings and ints; none if there is no file.

    Raises:
        UserError: if the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*kind._fields, *columns):
            raise UserError(f"{path} is from another benchmark or version: move it away")
        return {
            kind(*(of(row[name]) for name, of in kind.__annotations__.items())): {
                name: float(row[name]) if row[name] else None for name in columns
            }
            for row in reader
        }


def write_points(path: Path, kind: type, columns: Sequence[str], rows: Mapping[Any, Row]) -> None:
    """Write one row for each point, values with 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*kind._fields, *columns))
        for point, row in rows.items():
            writer.writerow((*point, *("" if row[name] is None else f"{row[name]:.6g}" for name in columns)))
