"""Which subjects preprocessing has finished: in its output folder a subject is whole, or it does not count.

A subject's slices are written to OUT/.partial and moved from there to their places. When the last one is in place,
so is OUT/subjects/{subject}.json, its record: what the slices were made with and from, and each file with its size.
Without a record that its files agree with, a subject is not whole, and the next run makes it again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import UserError

if TYPE_CHECKING:  # `--help` need not wait for it
    import numpy as np

RECORDS = "subjects"
PARTIAL = ".partial"
LOCK = ".lock"


@dataclass(frozen=True)
class Record:
    """A whole subject: what its slices depend on, and how many bytes each has, by its path in the output folder."""

    made_with: dict
    files: dict[str, int]


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to: {error}") from error


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it for the time being; a UserError if one is at work there."""
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / LOCK).open("a")
    with file:
        try:
            # This kind of lock ends with this process, however it ends, and is not handed down to workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another run is writing to {output_dir}: wait for it, or name another --output_dir"
            ) from error
        yield


def find_whole(output_dir: Path) -> dict[str, Record]:
    """The records of all whole subjects, by subject."""
    records = {path.stem: load_record(path) for path in sorted(output_dir.glob(f"{RECORDS}/*.json"))}
    return {
        subject: record
        for subject, record in records.items()
        if record and all(n_bytes == size(output_dir / name) for name, n_bytes in record.files.items())
    }


def read_normalisation(output_dir: Path) -> dict[str, float] | None:
    """The quantiles that the folder's slices were normalised by, all alike; None where there is no record of them."""
    records = (load_record(path) for path in sorted(output_dir.glob(f"{RECORDS}/*.json")))
    made_with = next((record.made_with for record in records if record), None)
    keys = ("percentage_lower", "percentage_upper")
    return {key: made_with[key] for key in keys} if made_with and made_with.keys() >= set(keys) else None


def read_grid(output_dir: Path) -> dict[str, Any] | None:
    """The grid that all the folder's slices lie on: {"axcodes": "LPS", "spacing": [1, 1, 1], "shape": [240, 240]}, say.

    The spacing is in mm, the shape that of a slice. None where the records do not agree on one, or where one of an
    earlier version says nothing of it.
    """
    grids = []
    for path in sorted(output_dir.glob(f"{RECORDS}/*.json")):
        record = load_record(path)
        grids.append(record.made_with.get("grid") if record else None)
    return grids[0] if grids and all(grid == grids[0] for grid in grids) else None


def load_record(path: Path) -> Record | None:
    """None where the file is not what `store` writes, as though there were none."""
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if isinstance(record.made_with, dict) and isinstance(record.files, dict) else None


def size(path: Path) -> int:
    """In bytes; -1 where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def clear(output_dir: Path, whole: Iterable[str], leftovers: Iterable[Path]) -> None:
    """Remove what earlier runs left beside the whole subjects: other records, other slices, what is half written.

    It goes all at once, before a new slice is written: neither slices of two settings nor a new slice with an old
    record ever lie side by side.
    """
    keep = set(whole)
    with writing(output_dir):
        for path in output_dir.glob(f"{RECORDS}/*.json"):
            if path.stem not in keep:
                path.unlink()
        for path in leftovers:
            path.unlink()
        if (output_dir / PARTIAL).exists():
            shutil.rmtree(output_dir / PARTIAL)


def store(
    output_dir: Path, part: str, subject: str, made_with: dict, slices: dict[str, np.ndarray]
) -> Record:
    """Put a subject's slices in place, so that whoever reads OUT/{part} meantime sees no part of a subject.

    Args:
        slices: images [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, one kind after the other: they are moved in
            this order, so until the last one is in place a kind is incomplete beside a complete one or alone, and
            the dataset refuses a slice that lacks a kind.
    """
    import numpy as np

    partial = output_dir / PARTIAL
    with writing(output_dir):
        partial.mkdir(exist_ok=True)
        files = {}
        for name, image in slices.items():
            path = partial / Path(name).name
            np.save(path, image)
            files[f"{part}/{name}"] = size(path)
        for name in slices:
            place = output_dir / part / name
            (partial / place.name).replace(place)
        record = Record(made_with, files)
        path = partial / f"{subject}.json"
        path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        path.replace(output_dir / RECORDS / path.name)
        partial.rmdir()
    return record
