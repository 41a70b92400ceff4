"""Read and write the files of a test run: error_maps.npz, metrics.json and per_slice.csv."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import titles
from utils.cli import UserError
from utils.records import STRING, integer, nullable, object_of, parse, read_json

from .scores import OPTIONS, RANGES, Constants, ScoreSettings

ERROR_MAPS, METRICS, PER_SLICE = "error_maps.npz", "metrics.json", "per_slice.csv"
MAPS = ("image", "translation", "reconstruction", "variance", "scores", "truth", "brainmask")  # [N, H, W] each
MASKS = ("truth", "brainmask")  # the bool arrays of MAPS; the others are floats
REFERENCE = "reference"  # additional array of one-way runs: the target modality, which the translation is compared with
SPLITS = ("test", "val", "train")  # scores and thresholds are chosen on "val"; without it, "train" calibrates scores
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
# Scores are non-negative, and so are thresholds.
_THRESHOLD = nullable({"allOf": [_AT_THRESHOLD, {"properties": {"threshold": {"minimum": 0}}}]})
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
_METRICS["properties"]["chosen"] = nullable(_CHOSEN)
_METRICS["properties"]["baseline_intensity"]["properties"] = {"chosen": nullable(_CHOSEN)}

Maps = Mapping[str, Mapping[str, Any]]  # for each split, slice `names` and the arrays in MAPS


def write_maps(path: Path, run: Mapping[str, Any], maps: Maps) -> None:
    """Write error_maps.npz, from which a test run can be scored again without its networks.

    Args:
        path: the file, in an existing folder.
        run: the header, JSON-serialisable: methods, checkpoints and sampling settings.
        maps: for each split, `names` ("{subject}_{slice}") and arrays [N, H, W]; stored as test_scores, test_truth, ….
    """
    arrays = {f"{split}_{key}": array for split, group in maps.items() for key, array in group.items()}
    np.savez_compressed(path, run=json.dumps(run), **arrays)


def read_maps(path: Path) -> tuple[dict[str, Any], Maps]:
    """Read the header and the maps that `write_maps` wrote.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: run modality_cyclic_test.py first")
    try:
        with np.load(path) as file:
            run = parse(str(file["run"]), _RUN)
            splits = [split for split in SPLITS if split == "test" or f"{split}_names" in file]
            kept = (*MAPS, REFERENCE) if f"test_{REFERENCE}" in file else MAPS
            maps = {split: {key: file[f"{split}_{key}"] for key in ("names", *kept)} for split in splits}
        _, height, width = maps["test"]["scores"].shape
        for group in maps.values():
            shapes = {group[key].shape for key in kept} | {(*group["names"].shape, height, width)}
            if shapes != {(len(group["scores"]), height, width)} or not len(group["scores"]):
                raise ValueError(f"no slices, or array shapes differ: {shapes}")
            for key in ("names", *kept):
                kind = "U" if key == "names" else "b" if key in MASKS else "f"
                if group[key].dtype.kind != kind:
                    raise ValueError(f"{key} has dtype {group[key].dtype}")
            if not (np.isfinite(group["scores"]) & group["brainmask"]).any():
                raise ValueError("no finite score in any brain")
    except Exception as error:  # NumPy, zipfile and json raise many types of exceptions for damaged files
        raise UserError(f"{path} cannot be scored ({error}): run modality_cyclic_test.py again") from error
    return run, maps


def write_scores(
    results: Path, metrics: Mapping[str, Any], names: Sequence[str], per_slice: Mapping[str, np.ndarray]
) -> None:
    """Write metrics.json, and per_slice.csv with one row per slice name, to a test run's folder."""
    with (results / PER_SLICE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "slice", *per_slice])
        for i, name in enumerate(names):
            writer.writerow([*name.rsplit("_", 1), *(f"{column[i]:.6g}" for column in per_slice.values())])
    (results / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


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
