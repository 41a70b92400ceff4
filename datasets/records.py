"""Records of preprocessed subjects, so that an interrupted run can resume.

A subject's slices are written to OUT/.partial and then moved into place. After the last one, its record
OUT/subjects/{subject}.json is written: the provenance of the slices, and the size of each file. A subject whose files
do not match its record is incomplete, and the next run makes it again.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import UserError
from utils.files import write_atomically, writing
from utils.records import SUBJECT, parse

if TYPE_CHECKING:  # too slow to import for `--help`
    import numpy as np

RECORDS = "subjects"
PARTIAL = ".partial"
NORMALISATION = {"percentage_lower": 0.02, "percentage_upper": 0.9}  # the paper's quantiles
TEST_SLICES = ("largest", "all")  # of val and test subjects
EARLIER = {"test_slices": "largest", "rules": 1}  # settings of records from before these keys existed
START_OVER = "pass --overwrite to start over, or choose another --output_dir"
AGAIN = "preprocess again with --overwrite"  # in messages of the other scripts, whose --overwrite has another meaning


@dataclass(frozen=True)
class Record:
    """Record of a complete subject."""

    made_with: dict  # provenance of the slices, as in `SubjectSlices`
    files: dict[str, int]  # size in bytes by path in the output folder
    crc32: dict[str, int]  # of each file, empty in records of earlier versions


def load_records(output_dir: Path) -> dict[str, Record | None]:
    """Return the record of each subject, None where the file is damaged."""
    records: dict[str, Record | None] = {}
    for path in sorted(output_dir.glob(f"{RECORDS}/*.json")):
        try:
            content = parse(path.read_text(encoding="utf-8"), SUBJECT)
            records[path.stem] = Record(content["made_with"], content["files"], content.get("crc32", {}))
        except (OSError, ValueError):
            records[path.stem] = None
    return records


def find_complete(output_dir: Path) -> dict[str, Record]:
    """Return the records of all complete subjects, by subject."""

    def is_complete(record: Record) -> bool:
        files = {output_dir / name: n_bytes for name, n_bytes in record.files.items()}
        return all(path.is_file() and path.stat().st_size == n_bytes for path, n_bytes in files.items())

    records = load_records(output_dir)
    return {subject: record for subject, record in records.items() if record and is_complete(record)}


def read_preprocessing(
    output_dir: Path, records: Mapping[str, Record | None] | None = None
) -> dict[str, dict[str, Any] | None]:
    """Return the preprocessing that all slices in a folder share, for config.json, given its records if at hand.

    Returns:
        `normalisation`, the quantiles by the names in NORMALISATION, and `grid`, a `SliceGeometry` as JSON. Either is
        None if it was not recorded; `grid` also if the records differ.

    Raises:
        UserError: if the records differ in anything else that all subjects must share.
    """
    records = load_records(output_dir) if records is None else records
    made_with = [record.made_with if record else {} for record in records.values()]
    for key in (*NORMALISATION, *EARLIER):
        found = {made.get(key, EARLIER.get(key)): name for name, made in zip(records, made_with, strict=True) if made}
        if len(found) > 1:
            which = " and ".join(f"{name} with {key} {value}" for value, name in found.items())
            raise UserError(f"{output_dir} mixes slices that do not belong together, {which}: {AGAIN}")
    first = next(filter(None, made_with), {})
    quantiles = {key: first[key] for key in NORMALISATION} if first.keys() >= NORMALISATION.keys() else None
    grids = [provenance.get("grid") for provenance in made_with]
    agreed = grids and all(grid == grids[0] for grid in grids)
    return {"normalisation": quantiles, "grid": grids[0] if agreed else None}


def read_lesion_flags(output_dir: Path) -> dict[str, bool]:
    """Return for each subject whether it has a lesion anywhere in its volume; subjects without a record are absent."""
    records = (item for item in load_records(output_dir).items() if item[1])
    return {subject: record.made_with["lesion"] for subject, record in records if "lesion" in record.made_with}


def find_finished(output_dir: Path, describe: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Record]:
    """Return the records of the subjects that earlier runs finished.

    `describe` returns the provenance that a subject would have in this run, None if this run would not make it.

    Raises:
        UserError: if a subject's provenance differs, because one folder must not mix slices of two settings.
    """
    finished = find_complete(output_dir)
    for subject, record in finished.items():
        if mismatch := describe_mismatch(record.made_with, describe(subject)):
            raise UserError(f"{output_dir} contains {subject}, {mismatch}: {START_OVER}")
    return finished


def describe_mismatch(made_with: Mapping[str, Any], requested: Mapping[str, Any] | None) -> str:
    """Return the first difference between recorded and requested provenance as a clause, empty if they agree."""
    if requested is None:
        return "which is not in any split list now"
    for key, now in requested.items():
        before = made_with.get(key, EARLIER.get(key))
        if before == now:
            continue
        if key == "volumes":
            before = before if isinstance(before, dict) else {}
            kinds = [kind for kind in now | before if before.get(kind) != now.get(kind)]
            return f"made from a different {' and '.join(kinds)}"
        if key == "split":
            return f"which was in the {before} split and is now in {now}"
        if key == "rules":
            return "made by another version of this script"
        return f"made with --{key} {before}, not {now}"
    return ""


def find_stale_slices(
    output_dir: Path,
    splits: Mapping[str, Collection[str]],
    kinds: Collection[str],
    finished: Mapping[str, Record],
    overwrite: bool,
) -> list[Path]:
    """Return the slices that belong to no finished subject, left by an interrupted run, sorted.

    Raises:
        UserError: if a file is not a slice or, without `overwrite`, has a subject or kind that this run does not make.
    """
    in_use = {name for record in finished.values() for name in record.files}
    stale = []
    for split, members in splits.items():
        for path in sorted(output_dir.glob(f"{split}/*/*.npy")):
            kind = path.parent.name
            name = re.fullmatch(rf"(.+)_{re.escape(kind)}_\d+", path.stem)
            if name is None:
                raise UserError(f"{path} was not written by this script: move it away or choose another --output_dir")
            if f"{split}/{kind}/{path.name}" in in_use:
                continue
            if not overwrite and (kind not in kinds or name[1] not in members):
                raise UserError(f"{path} is from an earlier run with other subjects or modalities: {START_OVER}")
            stale.append(path)
    return stale


def prepare_output_dir(
    output_dir: Path, finished: Collection[str], stale: Iterable[Path], splits: Iterable[str], kinds: Iterable[str]
) -> None:
    """Delete stale slices and the records of unfinished subjects, and create all folders.

    This happens before any new slice is written, so that old and new slices or records are never mixed.
    """
    with writing(output_dir, "--output_dir"):
        records = output_dir.glob(f"{RECORDS}/*.json")
        for path in (*(path for path in records if path.stem not in finished), *stale):
            path.unlink()
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        for folder in (RECORDS, *(f"{split}/{kind}" for split in splits for kind in kinds)):
            (output_dir / folder).mkdir(parents=True, exist_ok=True)


def store(output_dir: Path, split: str, subject: str, made_with: dict, slices: Mapping[str, np.ndarray]) -> Record:
    """Write a subject's slices and record so that a concurrent reader of OUT/{split} never gets half a subject.

    `slices` holds images [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, grouped by kind. They are moved into place
    kind by kind: until the last one, some slice lacks a kind, and the dataset refuses to load it.
    """
    import numpy as np

    partial = output_dir / PARTIAL
    with writing(output_dir, "--output_dir"), ExitStack() as on_failure:
        partial.mkdir(exist_ok=True)
        on_failure.callback(shutil.rmtree, partial, ignore_errors=True)
        files, crc32 = {}, {}
        for name, image in slices.items():
            path = partial / Path(name).name
            np.save(npy := BytesIO(), image)  # written to a file directly, a full disk gives no reason in the error
            path.write_bytes(npy.getbuffer())
            files[f"{split}/{name}"], crc32[f"{split}/{name}"] = path.stat().st_size, zlib.crc32(npy.getbuffer())
        for name in slices:
            (partial / Path(name).name).replace(output_dir / split / name)
        record = Record(made_with, files, crc32)
        write_atomically(output_dir / RECORDS / f"{subject}.json", json.dumps(asdict(record), indent=1) + "\n")
    return record
