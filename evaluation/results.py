"""The files of a test run: error maps, metrics.json and per_slice.csv, written and read."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import titles
from utils.cli import UserError
from utils.records import STRING, entries, optional, parse, read_json, whole

from .scores import OPTIONS, RANGES, Constants, ScoreSettings

ERROR_MAPS, METRICS, PER_SLICE = "error_maps.npz", "metrics.json", "per_slice.csv"
MAPS = ("image", "translation", "reconstruction", "variance", "scores", "truth", "brainmask")  # [N, H, W] each
MASKS = ("truth", "brainmask")  # which of them are bool; the others are floats
# The modality that a one-way reconstruction is compared with; other runs compare with the image.
REFERENCE = "reference"

# Validation slices choose a score and thresholds; where there are none, training slices say what error is usual.
SPLITS = ("test", "val", "train")

# Titles by `method` of metrics.json.
TITLES = {**titles(), "combined": "combined runs"}
# What a score says, by its kind (see models/cycle.py).
SCORE_MEANINGS = {
    "errors": "squared cyclic error",
    "reconstructions": "squared cyclic error",
    "standardised": "squared cyclic error, times the usual",
    "chosen": "score, chosen on validation slices",
    "combined": "sum of standardised scores",
}

# What is read from metrics.json and from the header of error_maps.npz.
_NUMBER = {"type": ["number", "null"]}  # null where it is undefined
_INTERVAL = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
_AT_THRESHOLD = entries(threshold=_NUMBER, dice=_NUMBER, dice_interval=_INTERVAL)
_BLOCK = entries(auprc=_NUMBER, auprc_interval=_INTERVAL, oracle=_AT_THRESHOLD, validation=optional(_AT_THRESHOLD))
_RUN = entries(
    method={"enum": list(TITLES)},
    input=STRING,
    trans=STRING,
    score={"enum": list(SCORE_MEANINGS)},
    sampling_settings=entries(smooth={"enum": ["none", "median3", "median5"]}),
    checkpoints={"type": "object", "additionalProperties": STRING},
    trained_steps={"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
    image_size=whole(1, 16_384),
)
_METRICS = entries(
    **_RUN["properties"],
    **_BLOCK["properties"],
    n_slices=whole(1, 10**9),
    chance=_NUMBER,
    lost_lesion_share=_NUMBER,
    usual_error={"type": "number", "minimum": 0},
    unsmoothed=optional(_BLOCK),
    baseline_intensity={"allOf": [_BLOCK, entries(sign={"enum": [1, -1]})]},
)
_RUN["properties"]["rim"] = {"type": "number", "minimum": 0, "maximum": RANGES["rim"][1]}  # of combined runs only
# No score is below 0, and so no threshold.
_THRESHOLD = optional({"allOf": [_AT_THRESHOLD, {"properties": {"threshold": {"minimum": 0}}}]})
_METRICS["properties"]["validation"] = _THRESHOLD
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_SCORE = {
    "settings": entries(
        **{name: {"enum": list(known)} for name, known in OPTIONS.items()},
        **{name: {"type": "number", "minimum": low, "maximum": high} for name, (low, high) in RANGES.items()},
    ),
    "constants": entries(
        error_floor=_POSITIVE,
        slope=_POSITIVE,
        offset={"type": "number"},
        intensities=_NUMBERS,
        usual={"type": "array", "items": _POSITIVE},
    ),
}
_CHOSEN = {"allOf": [_BLOCK, entries(validation=_THRESHOLD, **_SCORE)]}
_METRICS["properties"]["members"] = {
    "type": "array",
    "minItems": 1,
    "items": entries(
        run=STRING,
        method={"enum": [*TITLES, "intensity"]},
        input=STRING,
        trans=STRING,
        checkpoints={"type": "object", "additionalProperties": {"type": "string", "pattern": "[^/]/[^/]+$"}},
        sampling_settings={"type": "object"},
        weight={"type": "number", "minimum": 0, "maximum": 1e9},
        **_SCORE,
    ),
}
# Runs of earlier versions have none.
_METRICS["properties"]["chosen"] = optional(_CHOSEN)
_METRICS["properties"]["baseline_intensity"]["properties"] = {"chosen": optional(_CHOSEN)}

Maps = Mapping[str, Mapping[str, Any]]  # by split: `names` of the slices, and the arrays named in MAPS


def write_maps(path: Path, run: Mapping[str, Any], maps: Maps) -> None:
    """Write error_maps.npz, which is enough to score a test run again without a model.

    Args:
        path: of the file, in a folder that is there.
        run: JSON-able, what was chained and how.
        maps: by split, `names` ("{subject}_{slice}") and arrays [N, H, W]; in the file they are called
            test_scores, test_truth and so on.
    """
    arrays = {f"{split}_{key}": array for split, group in maps.items() for key, array in group.items()}
    np.savez_compressed(path, run=json.dumps(run), **arrays)


def read_maps(path: Path) -> tuple[dict[str, Any], Maps]:
    """What `write_maps` was given; a UserError if the file is not there, or is not what `write_maps` writes."""
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: run modality_cyclic_test.py first")
    try:
        with np.load(path) as file:
            run = parse(str(file["run"]), _RUN)
            splits = [split for split in SPLITS if split == "test" or f"{split}_names" in file]
            kept = (*MAPS, REFERENCE) if f"test_{REFERENCE}" in file else MAPS
            maps = {split: {key: file[f"{split}_{key}"] for key in ("names", *kept)} for split in splits}
        for group in maps.values():
            n_slices, height, width = group["scores"].shape
            shapes = {group[key].shape for key in kept} | {(*group["names"].shape, height, width)}
            if shapes != {(n_slices, height, width)} or not n_slices:
                raise ValueError(f"arrays of different shapes, or no slices: {shapes}")
            if group["names"].dtype.kind != "U":
                raise ValueError(f"names of slices that are {group['names'].dtype}")
            for key in kept:
                kind = "b" if key in MASKS else "f"
                if group[key].dtype.kind != kind:
                    raise ValueError(f"{key} holds {group[key].dtype}")
            if (height, width) != maps["test"]["scores"].shape[1:]:
                raise ValueError(f"{group['scores'].shape} maps of another size than the test maps")
            if not (np.isfinite(group["scores"]) & group["brainmask"]).any():
                raise ValueError("no finite score in any brain")
    except Exception as error:  # whatever NumPy, zip and JSON make of a file that is damaged or another's
        raise UserError(f"{path} cannot be scored ({error}): run modality_cyclic_test.py again") from error
    return run, maps


def write_scores(
    results: Path, metrics: Mapping[str, Any], names: Sequence[str], per_slice: Mapping[str, np.ndarray]
) -> None:
    """Write metrics.json, and per_slice.csv with columns of a value for each name, into the folder of a test run."""
    with (results / PER_SLICE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "slice", *per_slice])
        for i, name in enumerate(names):
            writer.writerow([*name.rsplit("_", 1), *(f"{column[i]:.6g}" for column in per_slice.values())])
    (results / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def read_metrics(results: Path, remedy: str = "run modality_cyclic_test.py first") -> dict[str, Any]:
    """The contents of a test run's metrics.json; a UserError, with what to do, if there is none, or it is damaged."""
    path = results / METRICS
    if not path.is_file():
        raise UserError(f"no {METRICS} in {results}: {remedy}")
    return read_json(path, _METRICS, remedy)


def read_per_slice(results: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The rows of a test run's per_slice.csv by (subject, slice); a UserError if there is none, or it is damaged."""
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
            raise ValueError("no slices, a slice twice, or no lesion_area")
        if any(math.isinf(value) for row in slices.values() for value in row.values()):
            raise ValueError("an infinite value")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): score the run again with --rescore") from error
    return slices


def chosen_score(block: Mapping[str, Any]) -> tuple[ScoreSettings, Constants]:
    """The settings and constants of a chosen score, from its block in metrics.json; a UserError if they do not fit."""
    settings = ScoreSettings(**{name: block["settings"][name] for name in ScoreSettings._fields})
    constants = Constants(**{name: block["constants"][name] for name in Constants._fields})
    if len(constants.intensities) != len(constants.usual) or sorted(constants.intensities) != constants.intensities:
        raise UserError("the constants of the chosen score in metrics.json are damaged: score the run with --rescore")
    return settings, constants
