"""Raw data sets, each read into one simple thing, a `Cohort`: its subjects, and where the volumes of each lie.

A folder of BraTS is read by the names of its files, whichever year named them: another naming takes one more row in
NAMINGS. Any other data set is described by a table, a CSV file with a row for each subject:

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
MASKS = ("seg", "brainmask")  # what is no modality


class Naming(NamedTuple):
    """How a data set names the volume of a subject: NAME/NAME{separator}{word}.nii.gz."""

    separator: str
    kinds: dict[str, str]  # a file's word → what it is called here; other words keep their own name


NAMINGS = {  # a folder has the first one that one of its files fits
    "BraTS 2021": Naming("_", {"flair": "flair", "t1": "t1", "t1ce": "t1ce", "t2": "t2", "seg": "seg"}),
    "BraTS 2023": Naming("-", {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "seg": "seg"}),
}

# The columns of a table that are no modality.
COLUMNS = ("subject", *MASKS, "healthy", "split")
RESERVED = (*COLUMNS, "name")  # the dataset gives each slice a `name` beside its modalities


class Subject(NamedTuple):
    """One subject's raw volumes."""

    name: str
    volumes: dict[str, Path]  # by kind (modalities, seg, brainmask), where they lie or, if missing, should
    healthy: bool = False  # by declaration: no lesion in any slice


@dataclass(frozen=True)
class Cohort:
    """A raw data set."""

    source: Path  # the folder or the table that it was read from
    subjects: dict[str, Subject]  # by name, sorted
    modalities: tuple[str, ...]  # that any subject has, sorted
    highest_label: int  # of its lesion masks: whole numbers from 0 to this
    splits: dict[str, list[str]] | None = None  # subjects by split, where the data set itself says so
    list_folders: tuple[Path, ...] = ()  # where its split lists may lie
    excluded: tuple[str, ...] = ()  # subjects of which nothing says where they are healthy
    on_one_grid: bool = True  # its volumes have one orientation, voxel size and shape, as those of BraTS have


def read_brats(data_dir: Path) -> Cohort:
    """The cohort of the folders NAME in `data_dir` that hold volumes of their name, in any of NAMINGS.

    A UserError if `data_dir` is not a folder, or holds no subject.
    """
    if not data_dir.is_dir():
        raise UserError(f"there is no folder {data_dir}: unpack BraTS there or name another --data_dir")
    folders = (folder for folder in sorted(data_dir.iterdir()) if folder.is_dir())
    found = {folder: there for folder in folders if (there := find_volumes(folder))}
    if not found:
        examples = [f"NAME{naming.separator}{next(iter(naming.kinds))}.nii.gz" for naming in NAMINGS.values()]
        raise UserError(f"no subject in {data_dir}: expected folders like NAME with {' or '.join(examples)} in them")
    modalities = sorted({kind for _, volumes in found.values() for kind in volumes}.difference(MASKS))
    subjects = {}
    for folder, (naming, there) in found.items():
        words = {kind: word for word, kind in naming.kinds.items()}
        stem = folder / f"{folder.name}{naming.separator}"
        volumes = {
            kind: there.get(kind, Path(f"{stem}{words.get(kind, kind)}{VOLUME_SUFFIXES[0]}"))
            for kind in (*modalities, "seg")
        }
        subjects[folder.name] = Subject(folder.name, volumes)
    highest_label = 4  # BraTS 2021 uses all but 3, other years do not
    return Cohort(data_dir, subjects, tuple(modalities), highest_label, list_folders=(data_dir, Path("datasets")))


def find_volumes(folder: Path) -> tuple[Naming, dict[str, Path]] | None:
    """How a subject's folder names its volumes, and these by kind; None if it is no subject's."""
    for naming in NAMINGS.values():
        prefix, volumes = folder.name + naming.separator, {}
        for suffix in reversed(VOLUME_SUFFIXES):  # of a volume that is there twice, the first suffix counts
            for path in folder.iterdir():
                if path.name.startswith(prefix) and path.name.endswith(suffix):
                    word = path.name.removeprefix(prefix).removesuffix(suffix)
                    volumes[naming.kinds.get(word, word)] = path
        if volumes.keys() & set(naming.kinds.values()):
            return naming, volumes
    return None


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint at what an unknown modality may mean; empty where there is none."""
    known = list(known)
    for year, naming in NAMINGS.items():
        if naming.kinds.get(word) in known:
            return f", the {word} of {year} is called {naming.kinds[word]} here"
    return did_you_mean(word, known)


def read_table(path: Path) -> Cohort:
    """The cohort that a CSV file describes, a row a subject. Its paths are relative to the file's folder.

    Columns: `subject`; any number of modalities, by any name; and, where the table has them, `seg` (lesion mask),
    `brainmask`, `healthy` (yes or no) and `split` (train, val or test). A UserError if the file cannot be read, or does
    not hold such a table.
    """
    columns, rows = read_cells(path)
    modalities = tuple(sorted(set(columns) - set(COLUMNS)))
    subjects, excluded, split_of = {}, [], {}
    for line, row in rows:
        name, where = row["subject"], f"{path}, line {line}"
        require_file_name(f"{where}: subject", name)
        if name in subjects or name in excluded:
            raise UserError(f"{where}: subject {name} is there twice, give each subject one row")
        healthy = require_word(where, row, "healthy", ("yes", "no", "")) == "yes"
        split_of[name] = require_word(where, row, "split", SPLITS)
        volumes = {kind: path.parent / row[kind] for kind in (*modalities, *MASKS) if row.get(kind)}
        for kind, volume in volumes.items():
            twice = [other for other, there in volumes.items() if there == volume and other != kind]
            if twice:
                raise UserError(
                    f"{where}: {row[kind]} is named as {kind} and as {twice[0]}, they need files of their own"
                )
        if healthy or "seg" in volumes:
            subjects[name] = Subject(name, volumes, healthy)
        else:
            excluded.append(name)
    if not subjects:
        remedy = "give a seg, or healthy=yes, of at least one"
        raise UserError(f"{path} says of no subject where it is healthy: {remedy}")
    splits = None
    if "split" in columns:
        splits = {split: [name for name in sorted(subjects) if split_of[name] == split] for split in SPLITS}
    more = {"splits": splits, "excluded": tuple(sorted(excluded)), "on_one_grid": False}
    return Cohort(path, dict(sorted(subjects.items())), modalities, highest_label=255, **more)


def read_cells(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file, and its rows with their line numbers, cells by column; blank rows are skipped.

    A UserError if it is not there, is no text or no CSV, or has no subject, no modality or unusable columns.
    """
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "name a CSV file with --csv"
        raise UserError(f"the table {path} cannot be read: {error}; {remedy}") from error
    lines = [(line, cells) for line, cells in lines if any(cells)]
    if not lines:
        raise UserError(f"the table {path} is empty: begin with a row of column names, subject first")
    (_, header), *rows = lines
    # Whoever writes Seg means seg, and not a modality of this name.
    columns = [column.lower() if column.lower() in COLUMNS else column for column in header]
    check_columns(path, columns)
    for line, cells in rows:
        if len(cells) != len(columns):
            raise UserError(
                f"{path}, line {line} has {len(cells)} cells, but there are {len(columns)} columns: "
                "separate them by commas, and leave a cell empty where there is nothing to say"
            )
    if not rows:
        raise UserError(f"the table {path} has no subject: add a row for each one")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def check_columns(path: Path, columns: list[str]) -> None:
    """Raise a UserError unless there are a subject and a modality, and each column has a usable name of its own."""
    if "subject" not in columns:
        hint = f"{did_you_mean('subject', columns)} (it has {', '.join(columns)})"
        remedy = "name the columns in its first row, separated by commas"
        raise UserError(f"{path} has no column subject{hint}: {remedy}")
    for column in columns:
        require_file_name(f"{path}: column", column)
        if columns.count(column) > 1:
            raise UserError(f"{path} has two columns {column!r}: give each a name of its own")
        if column.lower() in RESERVED and column not in COLUMNS:
            raise UserError(f"{path}: no modality can be called {column!r}, rename this column")
    if not set(columns) - set(COLUMNS):
        raise UserError(f"{path} has no modality: add a column with the paths of its volumes for each one")


def require_word(where: str, row: dict[str, str], column: str, words: tuple[str, ...]) -> str:
    """What a row says in a column, in lower case, empty if there is none; a UserError where it is none of the words."""
    word, known = row.get(column, "").lower(), list(filter(None, words))
    if column in row and word not in words:
        hint = f"{did_you_mean(word, known)} (write {' or '.join(known)})"
        raise UserError(f"{where}: {column} is {row[column]!r}{hint}")
    return word


def require_file_name(what: str, name: str) -> None:
    """Raise a UserError unless files can bear this name on every system, and lists and flags can hold it."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > 100:
        allowed = "use up to 100 letters, digits, and . _ + - after the first"
        raise UserError(f"{what} {name!r} cannot be part of a file's name: {allowed}")


def require_known(modalities: Iterable[str], cohort: Cohort) -> None:
    """Raise a UserError for a modality that no subject of the cohort has."""
    for modality in modalities:
        if modality not in cohort.modalities:
            has = ", ".join(cohort.modalities) or "no modality"
            hint = suggest(modality, cohort.modalities)
            raise UserError(f"unknown modality {modality!r}, the data have {has}{hint}")
