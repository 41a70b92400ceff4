"""Read and write the files of a test run: error_maps.npz, metrics.json, per_slice.csv and per_subject.csv."""

import csv
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from models import titles
from utils.cli import UserError
from utils.records import STRING, integer, nullable, object_of, parse, read_json

from .scores import OPTIONS, RANGES, Constants, ScoreSettings
from .subjects import subject_of

ERROR_MAPS, METRICS, PER_SLICE, PER_SUBJECT = "error_maps.npz", "metrics.json", "per_slice.csv", "per_subject.csv"
MAPS = ("image", "translation", "reconstruction", "variance", "scores", "truth", "brainmask")  # [N, H, W] each
MASKS = ("truth", "brainmask")  # the bool arrays of MAPS; the others are floats
REFERENCE = "reference"  # additional array of one-way runs: the target modality, which the translation is compared with
HEALTHY = "healthy"  # additional array [N] bool: whether the slice's subject has no lesion anywhere
PART_SLICES = 1024  # slices, of whole subjects, that are held in memory at a time
SPLITS = ("test", "val", "train")  # scores and thresholds are chosen on "val"; without it, "train" calibrates scores
THRESHOLDS = ("oracle", "validation", "healthy")
TITLES = {**titles(), "combined": "combined runs"}  # by `method` in metrics.json
SCORE_MEANINGS = {  # axis labels by `score` in metrics.json (see models/cycle.py)
    "errors": "squared cyclic error",
    "reconstructions": "squared cyclic error",
    "standardised": "squared cyclic error / expected squared error",
    "chosen": "score chosen on validation slices",
    "combined": "sum of standardised scores",
}

# Schemas of metrics.json and of the header of error_maps.npz.
_NUMBER = {"type": ["number", "null"]}  # null if undefined
_INTERVAL = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
_AT_THRESHOLD = object_of(threshold=_NUMBER, dice=_NUMBER, dice_interval=_INTERVAL)
_BLOCK = object_of(auprc=_NUMBER, auprc_interval=_INTERVAL, oracle=_AT_THRESHOLD, validation=nullable(_AT_THRESHOLD))
_RUN = object_of(
    method={"enum": list(TITLES)},
    input=STRING,
    trans=STRING,
    score={"enum": list(SCORE_MEANINGS)},
    sampling_settings=object_of(smooth={"enum": ["none", "median3", "median5"]}),
    checkpoints={"type": "object", "additionalProperties": STRING},
    trained_steps={"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
    image_size=integer(1, 16_384),
)
# Scores are non-negative and in single precision, and so are thresholds.
_SINGLE = {"anyOf": [{"type": "null"}, {"const": 0}, {"type": "number", "minimum": 1e-45, "maximum": 3.4e38}]}
_THRESHOLD = nullable({"allOf": [_AT_THRESHOLD, {"properties": {"threshold": _SINGLE}}]})
_METRICS = object_of(
    **_RUN["properties"],
    **_BLOCK["properties"] | {"validation": _THRESHOLD},
    n_slices=integer(1, 10**9),
    chance=_NUMBER,
    lost_lesion_share=_NUMBER,
    usual_error={"type": "number", "minimum": 0},
    unsmoothed=nullable(_BLOCK),
    baseline_intensity={"allOf": [_BLOCK, object_of(sign={"enum": [1, -1]})]},
)
_RUN["properties"]["voxel_size"] = nullable(
    {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6}, "minItems": 3, "maxItems": 3}
)
_RUN["properties"]["rim"] = {"type": "number", "minimum": 0, "maximum": RANGES["rim"][1]}  # combined runs only
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_SCORE = {
    "settings": object_of(
        **{name: {"enum": list(known)} for name, known in OPTIONS.items()},
        **{name: {"type": "number", "minimum": low, "maximum": high} for name, (low, high) in RANGES.items()},
    ),
    "constants": object_of(
        error_floor=_POSITIVE,
        slope=_POSITIVE,
        offset={"type": "number"},
        intensities={"type": "array", "items": {"type": "number"}},
        usual={"type": "array", "items": _POSITIVE},
    ),
}
_CHOSEN = {"allOf": [_BLOCK, object_of(validation=_THRESHOLD, **_SCORE)]}
_MEMBER = object_of(
    run=STRING,
    method={"enum": [*TITLES, "intensity"]},
    input=STRING,
    trans=STRING,
    checkpoints={"type": "object", "additionalProperties": {"type": "string", "pattern": "[^/]/[^/]+$"}},
    sampling_settings={"type": "object"},
    weight={"type": "number", "minimum": 0, "maximum": 1e9},
    **_SCORE,
)
_METRICS["properties"]["members"] = {"type": "array", "minItems": 1, "items": _MEMBER}
# Missing in runs of earlier versions.
_OF_SUBJECTS = object_of(
    **{"dice": _NUMBER, "dice_interval": _INTERVAL, "lesions_found": _NUMBER, "false_positives": _NUMBER},
    healthy=object_of(marked_share=_NUMBER, marked_share_interval=_INTERVAL, false_positives=_NUMBER),
)
_BY_SUBJECT = object_of(
    **{f"n_{key}": integer(0, 10**9) for key in ("subjects", "with_lesion", "healthy")},
    detection=object_of(subject=object_of(auroc=_NUMBER, auroc_interval=_INTERVAL)),
)
_BY_SUBJECT["properties"] |= {choice: nullable(_OF_SUBJECTS) for choice in THRESHOLDS}
_BLOCK["properties"] |= {"healthy": nullable(_AT_THRESHOLD), "by_subject": nullable(_BY_SUBJECT)}
_CHOSEN["allOf"][1]["properties"] |= {"healthy": _THRESHOLD}
_METRICS["properties"] |= {"healthy": _THRESHOLD, "by_subject": nullable(_BY_SUBJECT), "chosen": nullable(_CHOSEN)}
_HASHES = {"type": "object", "additionalProperties": STRING}
_RUN["properties"] |= {"weights": _HASHES, "test_set": _HASHES}
_MEMBER["properties"] |= {"weights": _HASHES}
_METRICS["properties"] |= {"weights": _HASHES, "test_set": _HASHES}
_METRICS["properties"]["baseline_intensity"]["properties"] = {"chosen": nullable(_CHOSEN)}


T = TypeVar("T")


class Parts(Sequence[T]):
    """Parts of a split, each with whole subjects, loaded when they are indexed; the last one is kept in memory.

    `fingerprint` describes the split's slices, as from `BraTS2021Dataset`.
    """

    def __init__(self, load: Callable[[int], T], n_parts: int, fingerprint: Mapping[str, Any] | None = None):
        self._load, self._n_parts, self.fingerprint = lru_cache(maxsize=1)(load), n_parts, fingerprint

    def __len__(self) -> int:
        return self._n_parts

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < self._n_parts:
            raise IndexError(index)
        return self._load(index)


Part = Mapping[str, Any]  # slice `names` [n], HEALTHY [n], and the arrays in MAPS [n, H, W]
Maps = Mapping[str, Sequence[Part]]  # by split


def divide(names: Sequence[str]) -> list[list[int]]:
    """Divide slices into parts of whole subjects; return the indices of each part's slices.

    A part has up to PART_SLICES slices, or a single subject.
    """
    if len(names) <= PART_SLICES:
        return [list(range(len(names)))]
    by_subject: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_subject.setdefault(subject_of(name), []).append(i)
    parts: list[list[int]] = [[]]
    for rows in by_subject.values():
        if parts[-1] and len(parts[-1]) + len(rows) > PART_SLICES:
            parts.append([])
        parts[-1] += rows
    return parts


class MapWriter:
    """Writer of error_maps.npz, from which a test run can be scored again without its networks.

    An array of the first part of a split is stored as test_scores, that of the next one as test_scores_1, and so on.
    """

    def __init__(self, path: Path):
        # Noise hardly compresses, and at level 1 three times as fast as at the default.
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._n_parts = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, part: Part) -> None:
        """Write a part of a split; arrays are in the order of its `names`."""
        for key, array in part.items():
            self._write(array_name(split, key, self._n_parts[split]), array)
        self._n_parts[split] += 1

    def close(self, run: Mapping[str, Any]) -> None:
        """Finish the file with its header, JSON-serialisable: methods, checkpoints and sampling settings."""
        self._write("run", json.dumps(run))
        self._file.close()

    def _write(self, name: str, array: Any) -> None:
        with self._file.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def write_maps(path: Path, run: Mapping[str, Any], maps: Maps) -> None:
    """Write all parts of all splits, and the header, to error_maps.npz."""
    writer = MapWriter(path)
    for split, parts in maps.items():
        for part in parts:
            writer.add(split, part)
    writer.close(run)


def array_name(split: str, key: str, part: int) -> str:
    """Return the name of an array in error_maps.npz."""
    return f"{split}_{key}" + (f"_{part}" if part else "")


def read_maps(path: Path) -> tuple[dict[str, Any], Maps]:
    """Read the header and the maps that `write_maps` wrote.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: run modality_cyclic_test.py first")
    with _scorable(path), np.load(path) as file:
        run, stored = parse(str(file["run"]), _RUN), set(file.files)
    maps = {}
    for split in SPLITS:
        n_parts = next(i for i in count() if array_name(split, "names", i) not in stored)
        if n_parts or split == "test":
            maps[split] = Parts(partial(StoredPart, path, split, stored), max(n_parts, 1))
    height, width = maps["test"][0]["scores"].shape[1:]
    for parts in maps.values():
        first = parts[0]
        if {first[key].shape[1:] for key in first if key not in ("names", HEALTHY)} != {(height, width)}:
            raise UserError(f"{path} cannot be scored (array shapes differ): run modality_cyclic_test.py again")
    return run, maps


class StoredPart(Mapping[str, np.ndarray]):
    """A part of error_maps.npz; its arrays are read, and checked, when they are first used.

    Reading raises a UserError for a damaged array.
    """

    def __init__(self, path: Path, split: str, stored: set[str], part: int):
        kept = ("names", *MAPS, *(key for key in (REFERENCE,) if array_name(split, key, part) in stored))
        self._path, self._names = path, {key: array_name(split, key, part) for key in kept}
        self._healthy = array_name(split, HEALTHY, part) if array_name(split, HEALTHY, part) in stored else None
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, key: str) -> np.ndarray:
        if key == HEALTHY and key not in self._arrays:
            self._arrays[key] = self._read(key, self._healthy) if self._healthy else lesion_free(self)
        if key not in self._arrays:
            self._arrays[key] = self._read(key, self._names[key])
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._names, HEALTHY))

    def __len__(self) -> int:
        return len(self._names) + 1

    def _read(self, key: str, name: str) -> np.ndarray:
        with _scorable(self._path), np.load(self._path) as file:
            array = file[name]
            kind = "U" if key == "names" else "b" if key in (*MASKS, HEALTHY) else "f"
            if array.dtype.kind != kind:
                raise ValueError(f"{name} has dtype {array.dtype}")
            if array.ndim != (1 if key in ("names", HEALTHY) else 3) or not len(array):
                raise ValueError(f"no slices, or array shapes differ: {name} has shape {array.shape}")
            if key != "names" and len(array) != len(self["names"]):
                raise ValueError(f"array shapes differ: {name} has shape {array.shape}")
            if key == "scores" and not (np.isfinite(array) & self["brainmask"]).any():
                raise ValueError("no finite score in any brain")
        return array.astype(np.float32) if array.dtype == np.float16 else array


@contextmanager
def _scorable(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file, for which NumPy, zipfile and json raise many types, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be scored ({error}): run modality_cyclic_test.py again") from error


def lesion_free(part: Part) -> np.ndarray:
    """Return for each slice [n] whether no slice of its subject has a lesion."""
    subjects = np.array([subject_of(name) for name in part["names"]])
    return ~np.isin(subjects, subjects[np.asarray(part["truth"]).any(axis=(1, 2))])


def write_scores(
    results: Path,
    metrics: Mapping[str, Any],
    names: Sequence[str],
    per_slice: Mapping[str, np.ndarray],
    per_subject: Mapping[str, np.ndarray],
) -> None:
    """Write metrics.json, per_slice.csv and, unless it is empty, per_subject.csv to a test run's folder."""
    subjects, numbers = zip(*(str(name).rsplit("_", 1) for name in names), strict=True)
    _write_table(results / PER_SLICE, {"subject": subjects, "slice": numbers, **per_slice})
    if per_subject:
        _write_table(results / PER_SUBJECT, per_subject)
    (results / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([value if isinstance(value, str) else f"{value:.6g}" for value in row])


def read_metrics(results: Path, remedy: str = "run modality_cyclic_test.py first") -> dict[str, Any]:
    """Read metrics.json from a test run's folder.

    Raises:
        UserError: if the file is missing or damaged; the message ends with `remedy`.
    """
    path = results / METRICS
    if not path.is_file():
        raise UserError(f"no {METRICS} in {results}: {remedy}")
    return read_json(path, _METRICS, remedy)


def read_per_slice(results: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Read the rows of a test run's per_slice.csv, keyed by (subject, slice).

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = results / PER_SLICE
    if not path.is_file():
        raise UserError(f"no {PER_SLICE} in {results}: run modality_cyclic_test.py first")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        slices = {
            (row.pop("subject"), row.pop("slice")): {key: float(value) for key, value in row.items()} for row in rows
        }
        if not slices or len(slices) < len(rows) or any("lesion_area" not in row for row in rows):
            raise ValueError("no slices, duplicate slices, or no column lesion_area")
        if any(math.isinf(value) for row in slices.values() for value in row.values()):
            raise ValueError("a value is infinite")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): score the run again with --rescore") from error
    return slices


def changed_kinds(run: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the kinds of test slices that two runs (contents of metrics.json) both scored, but with other contents."""
    first, second = run.get("test_set", {}), other.get("test_set", {})
    return [kind for kind in first if first[kind] != second.get(kind, first[kind])]


def chosen_score(block: Mapping[str, Any]) -> tuple[ScoreSettings, Constants]:
    """Return the settings and constants of a chosen score from its block in metrics.json.

    Raises:
        UserError: if the constants are damaged.
    """
    settings = ScoreSettings(**{name: block["settings"][name] for name in ScoreSettings._fields})
    constants = Constants(**{name: block["constants"][name] for name in Constants._fields})
    if len(constants.intensities) != len(constants.usual) or sorted(constants.intensities) != constants.intensities:
        raise UserError("the constants of the chosen score in metrics.json are damaged: score the run with --rescore")
    return settings, constants
