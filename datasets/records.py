"""Which subjects preprocessing has finished: in its output folder a subject is whole, or it does not count.

A subject's slices are written to OUT/.partial and moved from there to their places. When the last one is in place,
so is OUT/subjects/{subject}.json, its record: what the slices were made with and from, and each file with its size.
Without a record that its files agree with, a subject is not whole, and the next run makes it again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import UserError
from utils.files import write_whole, writing
from utils.records import SUBJECT, parse

if TYPE_CHECKING:  # `--help` need not wait for it
    import numpy as np

RECORDS = "subjects"
PARTIAL = ".partial"
NORMALISATION = {"percentage_lower": 0.02, "percentage_upper": 0.9}  # quantiles, the paper's
START_OVER = "give --overwrite to start over, or name another --output_dir"


@dataclass(frozen=True)
class Record:
    """A whole subject: what its slices depend on, and how many bytes each has, by its path in the output folder."""

    made_with: dict
    files: dict[str, int]


def load_records(output_dir: Path) -> dict[str, Record | None]:
    """The record of each subject; None where the file is not what `store` writes, as though there were none."""
    records: dict[str, Record | None] = {}
    for path in sorted(output_dir.glob(f"{RECORDS}/*.json")):
        try:
            found = parse(path.read_text(encoding="utf-8"), SUBJECT)
            records[path.stem] = Record(found["made_with"], found["files"])
        except (OSError, ValueError):
            records[path.stem] = None
    return records


def find_whole(output_dir: Path) -> dict[str, Record]:
    """The records of all whole subjects, by subject."""

    def is_whole(record: Record) -> bool:
        files = {output_dir / name: n_bytes for name, n_bytes in record.files.items()}
        return all(path.is_file() and path.stat().st_size == n_bytes for path, n_bytes in files.items())

    records = load_records(output_dir)
    return {subject: record for subject, record in records.items() if record and is_whole(record)}


def read_preprocessing(output_dir: Path) -> dict[str, dict[str, Any] | None]:
    """What all slices in a folder have in common, for config.json.

    Returns:
        `normalisation`, the quantiles as in NORMALISATION; and `grid`, the JSON of a `utils.grid.SliceGeometry`. None
        where there is no record of it, or where the records do not agree on a grid.
    """
    made_with = [record.made_with if record else {} for record in load_records(output_dir).values()]
    first = next(filter(None, made_with), {})
    quantiles = {key: first[key] for key in NORMALISATION} if first.keys() >= NORMALISATION.keys() else None
    grids = [one.get("grid") for one in made_with]
    agreed = grids and all(grid == grids[0] for grid in grids)
    return {"normalisation": quantiles, "grid": grids[0] if agreed else None}


def find_finished(output_dir: Path, describe: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Record]:
    """The subjects that earlier runs finished, with their records.

    `describe` tells what this run would make a subject with, or None. A UserError if it would make one of them
    differently, or not at all: the two must not be mixed.
    """
    finished = find_whole(output_dir)
    for subject, record in finished.items():
        if difference := name_difference(record.made_with, describe(subject)):
            raise UserError(f"{output_dir} holds {subject}, {difference}: {START_OVER}")
    return finished


def name_difference(made_with: Mapping[str, Any], asked_for: Mapping[str, Any] | None) -> str:
    """The first thing in which two descriptions of a subject differ, as a clause; empty where they agree."""
    if asked_for is None:
        return "which is in no split list now"
    for key, now in asked_for.items():
        before = made_with.get(key)
        if before == now:
            continue
        if key == "volumes":
            before = before if isinstance(before, dict) else {}
            kinds = [kind for kind in now | before if before.get(kind) != now.get(kind)]
            return f"made from another {' and '.join(kinds)} than the data have of it now"
        if key == "split":
            return f"which was in the {before} split and is in {now} now"
        return f"made with --{key} {before}, not {now}"
    return ""


def find_leftovers(
    output_dir: Path,
    splits: Mapping[str, Collection[str]],
    kinds: Collection[str],
    finished: Mapping[str, Record],
    overwrite: bool,
) -> list[Path]:
    """The slices beside those of finished subjects, sorted: a run that broke off left them.

    `kinds` are those that this run writes, of the subjects in `splits`. A UserError for a file that is no slice; or,
    unless all are overwritten, a slice that this run has no use for (of a subject that is now in another split or in
    none, or of a modality not asked for now).
    """
    in_use = {name for record in finished.values() for name in record.files}
    leftovers = []
    for split, members in splits.items():
        for path in sorted(output_dir.glob(f"{split}/*/*.npy")):
            kind = path.parent.name
            name = re.fullmatch(rf"(.+)_{re.escape(kind)}_\d+", path.stem)
            if name is None:
                raise UserError(f"{path} is no slice that this script wrote: move it away or name another --output_dir")
            if f"{split}/{kind}/{path.name}" in in_use:
                continue
            if not overwrite and (kind not in kinds or name[1] not in members):
                raise UserError(f"{path} is of an earlier run with other subjects or modalities: {START_OVER}")
            leftovers.append(path)
    return leftovers


def prepare(
    output_dir: Path, whole: Collection[str], leftovers: Iterable[Path], splits: Iterable[str], kinds: Iterable[str]
) -> None:
    """Remove what earlier runs left beside the whole subjects (other records, other slices), and make all folders.

    It goes all at once, before a new slice is written: neither slices of two settings nor a new slice with an old
    record ever lie side by side.
    """
    with writing(output_dir, "--output_dir"):
        records = output_dir.glob(f"{RECORDS}/*.json")
        for path in (*(path for path in records if path.stem not in whole), *leftovers):
            path.unlink()
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        for folder in (RECORDS, *(f"{split}/{kind}" for split in splits for kind in kinds)):
            (output_dir / folder).mkdir(parents=True, exist_ok=True)


def store(output_dir: Path, split: str, subject: str, made_with: dict, slices: Mapping[str, np.ndarray]) -> Record:
    """Put a subject's slices in place, so that whoever reads OUT/{split} meanwhile never sees half a subject.

    `slices` holds images [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, one kind after the other. They are moved in
    this order, so until the last one is in place a kind is incomplete beside a complete one or alone, and the dataset
    refuses a slice that lacks a kind.
    """
    import numpy as np

    partial = output_dir / PARTIAL
    with writing(output_dir, "--output_dir"), ExitStack() as on_failure:
        partial.mkdir(exist_ok=True)
        on_failure.callback(shutil.rmtree, partial, ignore_errors=True)
        files = {}
        for name, image in slices.items():
            path = partial / Path(name).name
            np.save(npy := BytesIO(), image)  # into a file, it would not say why it cannot write on
            path.write_bytes(npy.getbuffer())
            files[f"{split}/{name}"] = path.stat().st_size
        for name in slices:
            (partial / Path(name).name).replace(output_dir / split / name)
        record = Record(made_with, files)
        write_whole(output_dir / RECORDS / f"{subject}.json", json.dumps(asdict(record), indent=1) + "\n")
    return record
