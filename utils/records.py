"""JSON schemas of the records that runs write, and reading JSON that is validated against a schema."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema

from .cli import UserError

STRING, BOOL = {"type": "string"}, {"type": "boolean"}


def integer(least: int, most: int) -> dict[str, Any]:
    """Return the schema of an integer in [least, most]. Bounds on sizes are far above those of any real network."""
    return {"type": "integer", "minimum": least, "maximum": most}


def object_of(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has at least these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that also allows null."""
    return {"anyOf": [{"type": "null"}, schema]}


# Settings of the network. Missing ones take their values from the config of `--dataset`.
_MODEL = {
    "model_channels": integer(1, 4096),
    "channel_mult": {"type": "array", "items": integer(1, 64), "minItems": 1, "maxItems": 8},
    "num_res_blocks": integer(1, 64),
    "attention_resolutions": {"type": "array", "items": integer(1, 4096), "maxItems": 16},
    "num_heads": integer(1, 1024),
    "norm_groups": integer(1, 4096),
    "dropout": {"type": "number", "minimum": 0, "maximum": 1},
    "use_scale_shift_norm": BOOL,
    "resblock_updown": BOOL,
}
_SCORE_MODEL = {
    "model": {"type": "object", "properties": _MODEL, "additionalProperties": False},
    "diffusion": {"type": "object", "properties": {"steps": integer(1, 1_000_000)}},
    "mask": {"type": "object", "properties": {"width": integer(1, 16_384)}},
    "baselines": {"type": "object", "properties": {"latent_channels": integer(1, 4096)}},
}
_GRID = object_of(
    axcodes=STRING,
    spacing={"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, "minItems": 3},
    shape={"type": "array", "items": integer(1, 16_384), "minItems": 2},
)
_QUANTILE = {"type": "number", "minimum": 0, "maximum": 1}
_NORMALISATION = object_of(percentage_lower=_QUANTILE, percentage_upper=_QUANTILE)
EXPERIMENT = object_of(
    model_name=STRING,
    training_process={"enum": ["forward", "backward"]},
    config=object_of(
        data={"type": "object", "properties": {"input": STRING, "trans": STRING, "image_size": integer(1, 16_384)}},
        score_model={"type": "object", "properties": _SCORE_MODEL},
    ),
)
EXPERIMENT["properties"]["data"] = {
    "type": "object",
    "properties": {"grid": nullable(_GRID), "normalisation": nullable(_NORMALISATION)},
}

# Record of a preprocessed subject, in the output folder of preprocessing.
_MADE_WITH = {
    "grid": nullable(_GRID),
    "lesion": BOOL,
    "test_slices": {"enum": ["largest", "all"]},
    "rules": integer(1, 1000),
}
SUBJECT = object_of(
    made_with={"type": "object", "properties": _MADE_WITH | _NORMALISATION["properties"]},
    files={"type": "object", "additionalProperties": integer(0, 2**60)},
)
SUBJECT["properties"]["crc32"] = {"type": "object"}  # its values are compared with those of files


def parse(text: str, schema: Mapping[str, Any]) -> Any:
    """Parse JSON and validate it against a schema; error messages have one line.

    Raises:
        ValueError: if it is not JSON, contains a number that is not finite, or violates the schema.
    """
    try:
        found = json.loads(
            text, parse_int=lambda n: int(_finite(n)), parse_float=lambda n: float(_finite(n)), parse_constant=_finite
        )
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(found))
    except RecursionError as cause:
        raise ValueError("nested too deeply") from cause
    if error:
        message = error.message if len(error.message) < 150 else f"{error.message[:70]} … {error.message[-70:]}"
        raise ValueError(f"{error.json_path.removeprefix('$.')}: {' '.join(message.split())}")
    return found


def read_json(path: Path, schema: Mapping[str, Any], remedy: str) -> Any:
    """Read a JSON file and validate it against a schema.

    Raises:
        UserError: if it cannot be read or is invalid; the message ends with the remedy.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), schema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def _finite(text: str) -> str:
    """Return a number's text unchanged; reject NaN and infinity, which 1e999 is in double precision."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return text
