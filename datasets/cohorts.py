"""Raw data sets, read into a `Cohort`: subjects with the paths of their volumes.

A BraTS folder is read by its file names; support another release by adding its naming scheme to NAMING_SCHEMES. Any
other data set is described by a table, a CSV file with one row per subject:

    subject,FLAIR,T2,seg,healthy,split
    sub-01,scans/sub-01_FLAIR.nii.gz,scans/sub-01_T2.nii.gz,masks/sub-01.nii.gz,,test
    sub-02,scans/sub-02_FLAIR.nii.gz,scans/sub-02_T2.nii.gz,,yes,train
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.cli import UserError, did_you_mean

BRATS_DIR = Path("datasets/RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021")
VOLUME_SUFFIXES = (".nii.gz", ".nii")
SPLITS = ("train", "val", "test")
MASKS = ("seg", "brainmask")  # kinds of volumes that are not modalities


class NamingScheme(NamedTuple):
    """File names of a data set: NAME/NAME{separator}{suffix}.nii.gz."""

    separator: str
    kinds: dict[str, str]  # by suffix; any other suffix is the name of its kind


NAMING_SCHEMES = {  # the first one that matches any file of a folder is used
    "BraTS 2021": NamingScheme("_", {"flair": "flair", "t1": "t1", "t1ce": "t1ce", "t2": "t2", "seg": "seg"}),
    "BraTS 2023": NamingScheme("-", {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "seg": "seg"}),
}

COLUMNS = ("subject", *MASKS, "healthy", "split")  # of a table; every other column is a modality
RESERVED = (*COLUMNS, "name")  # `name` is the key of a slice's name in the dataset


class Subject(NamedTuple):
    """One subject's raw volumes."""

    name: str
    volumes: dict[str, Path]  # by kind (modalities, seg, brainmask); the files may be missing
    healthy: bool = False  # declared free of lesions


@dataclass(frozen=True)
class Cohort:
    """A raw data set."""

    source: Path  # folder or table that it was read from
    subjects: dict[str, Subject]  # by name, sorted
    modalities: tuple[str, ...]  # union over subjects, sorted
    max_label: int  # lesion masks hold integers from 0 to max_label
    splits: dict[str, list[str]] | None = None  # subjects by split, if the data set defines its own
    list_folders: tuple[Path, ...] = ()  # searched for split lists, in this order
    excluded: tuple[str, ...] = ()  # subjects with neither a seg nor healthy=yes
    shared_grid: bool = True  # all volumes have the same orientation, voxel size and shape, as in BraTS


def read_brats(data_dir: Path) -> Cohort:
    """Read a BraTS folder: every folder NAME in it with volumes named by one of NAMING_SCHEMES is a subject.

    Raises:
        UserError: if `data_dir` is not a folder or has no subject.
    """
    if not data_dir.is_dir():
        raise UserError(f"there is no folder {data_dir}: unpack BraTS there or choose another --data_dir")
    folders = (folder for folder in sorted(data_dir.iterdir()) if folder.is_dir())
    found = {folder: volumes for folder in folders if (volumes := find_volumes(folder))}
    if not found:
        examples = [f"NAME{scheme.separator}{next(iter(scheme.kinds))}.nii.gz" for scheme in NAMING_SCHEMES.values()]
        raise UserError(f"no subject in {data_dir}: expected folders NAME that contain {' or '.join(examples)}")
    modalities = sorted({kind for _, volumes in found.values() for kind in volumes}.difference(MASKS))
    subjects = {}
    for folder, (scheme, existing) in found.items():
        suffixes = {kind: suffix for suffix, kind in scheme.kinds.items()}
        stem = folder / f"{folder.name}{scheme.separator}"
        volumes = {
            kind: existing.get(kind, Path(f"{stem}{suffixes.get(kind, kind)}{VOLUME_SUFFIXES[0]}"))
            for kind in (*modalities, "seg")
        }
        subjects[folder.name] = Subject(folder.name, volumes)
    max_label = 4  # BraTS 2021 uses 0, 1, 2 and 4, later releases 3 as well
    return Cohort(data_dir, subjects, tuple(modalities), max_label, list_folders=(data_dir, Path("datasets")))


def find_volumes(folder: Path) -> tuple[NamingScheme, dict[str, Path]] | None:
    """Return a subject folder's naming scheme and its volumes by kind; None if no scheme matches."""
    for scheme in NAMING_SCHEMES.values():
        prefix, volumes = folder.name + scheme.separator, {}
        for extension in reversed(VOLUME_SUFFIXES):  # .nii.gz overrides .nii
            for path in folder.iterdir():
                if path.name.startswith(prefix) and path.name.endswith(extension):
                    suffix = path.name.removeprefix(prefix).removesuffix(extension)
                    volumes[scheme.kinds.get(suffix, suffix)] = path
        if volumes.keys() & set(scheme.kinds.values()):
            return scheme, volumes
    return None


def suggest_modality(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown modality, as a clause that begins with a comma, or an empty string."""
    known = list(known)
    for release, scheme in NAMING_SCHEMES.items():
        if scheme.kinds.get(name) in known:
            return f", the {name} of {release} is called {scheme.kinds[name]} here"
    return did_you_mean(name, known)


def read_table(path: Path) -> Cohort:
    """Read a CSV table with one row per subject; paths in it are relative to its folder.

    Columns: `subject`; one or more modalities of any name; and optionally `seg` (lesion mask), `brainmask`, `healthy`
    (yes or no) and `split` (train, val or test).

    Raises:
        UserError: if the file cannot be read or is not such a table.
    """
    columns, rows = read_rows(path)
    modalities = tuple(sorted(set(columns) - set(COLUMNS)))
    subjects, excluded, split_of = {}, [], {}
    for line, row in rows:
        name, where = row["subject"], f"{path}, line {line}"
        require_file_name(f"{where}: subject", name)
        if name in subjects or name in excluded:
            raise UserError(f"{where}: subject {name} appears twice, give each subject one row")
        healthy = require_choice(where, row, "healthy", ("yes", "no", "")) == "yes"
        split_of[name] = require_choice(where, row, "split", SPLITS)
        volumes = {kind: path.parent / row[kind] for kind in (*modalities, *MASKS) if row.get(kind)}
        for kind, volume in volumes.items():
            same = [other for other, path_of_other in volumes.items() if path_of_other == volume and other != kind]
            if same:
                raise UserError(f"{where}: {row[kind]} is both {kind} and {same[0]}, give each its own file")
        if healthy or "seg" in volumes:
            subjects[name] = Subject(name, volumes, healthy)
        else:
            excluded.append(name)
    if not subjects:
        raise UserError(f"{path} has no subject with a seg or healthy=yes: add one of the two to at least one row")
    splits = None
    if "split" in columns:
        splits = {split: [name for name in sorted(subjects) if split_of[name] == split] for split in SPLITS}
    options = {"splits": splits, "excluded": tuple(sorted(excluded)), "shared_grid": False}
    return Cohort(path, dict(sorted(subjects.items())), modalities, max_label=255, **options)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return a CSV file's columns, and its non-empty rows as (line number, cells by column).

    Raises:
        UserError: if the file is missing, not UTF-8 text or not CSV, or has no subject, no modality or bad columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.strip().partition("\n")[0].count)  # of equals the comma
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "pass a CSV file as --csv"
        raise UserError(f"the table {path} cannot be read: {error}; {remedy}") from error
    if delimiter != ",":
        print(f"{path} is separated by {'semicolons' if delimiter == ';' else 'tabs'}")
    lines = [(line, cells) for line, cells in lines if any(cells)]
    if not lines:
        raise UserError(f"the table {path} is empty: begin with a row of column names, subject first")
    (_, header), *rows = lines
    # Treat `Seg`, say, as the mask column, not as a modality.
    columns = [column.lower() if column.lower() in COLUMNS else column for column in header]
    check_columns(path, columns)
    for line, cells in rows:
        if len(cells) != len(columns):
            raise UserError(
                f"{path}, line {line} has {len(cells)} cells, but there are {len(columns)} columns: "
                "separate cells by commas, and leave those without a value empty"
            )
    if not rows:
        raise UserError(f"the table {path} has no subject: add one row per subject")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def check_columns(path: Path, columns: list[str]) -> None:
    """Raise a UserError unless there are a subject column and a modality, and all column names are valid and unique."""
    if "subject" not in columns:
        hint = f"{did_you_mean('subject', columns)} (it has {', '.join(columns)})"
        remedy = "name the columns in the first row, separated by commas"
        raise UserError(f"{path} has no column subject{hint}: {remedy}")
    for column in columns:
        require_file_name(f"{path}: column", column)
        if columns.count(column) > 1:
            raise UserError(f"{path} has two columns {column!r}: give each its own name")
        if column.lower() in RESERVED and column not in COLUMNS:
            raise UserError(f"{path}: no modality can be called {column!r}, rename the column")
    if not set(columns) - set(COLUMNS):
        raise UserError(f"{path} has no modality: add a column of volume paths for each modality")


def require_choice(where: str, row: dict[str, str], column: str, choices: tuple[str, ...]) -> str:
    """Check that a row's value in a column is one of the choices; return it in lower case, empty without the column."""
    value, known = row.get(column, "").lower(), list(filter(None, choices))
    if column in row and value not in choices:
        hint = f"{did_you_mean(value, known)} (write {' or '.join(known)})"
        raise UserError(f"{where}: {column} is {row[column]!r}{hint}")
    return value


def require_file_name(what: str, name: str) -> None:
    """Raise a UserError unless the name is valid in file names on all systems, in split lists and in flags."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > 100:
        allowed = "use up to 100 letters, digits and . _ + -, and begin with a letter, digit or _"
        raise UserError(f"{what} {name!r} cannot be part of a file name: {allowed}")


def require_modalities(modalities: Iterable[str], cohort: Cohort) -> None:
    """Raise a UserError for a modality that no subject of the cohort has."""
    for modality in modalities:
        if modality not in cohort.modalities:
            available = ", ".join(cohort.modalities) or "no modality"
            hint = suggest_modality(modality, cohort.modalities)
            raise UserError(f"unknown modality {modality!r}, the data have {available}{hint}")
