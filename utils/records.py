"""The records that runs keep of themselves in JSON, read in one way: as they should be, or not at all."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema

from .cli import UserError

STRING, BOOL = {"type": "string"}, {"type": "boolean"}


def whole(least: int, most: int) -> dict[str, Any]:
    """A whole number in a range. What it bounds are sizes: no network or image that anyone has is larger."""
    return {"type": "integer", "minimum": least, "maximum": most}


def entries(**properties: Any) -> dict[str, Any]:
    """An object with these entries at least."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def optional(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same, or null."""
    return {"anyOf": [{"type": "null"}, schema]}


# What a network is made of. Entries that are not there have the values of the config of `--dataset`.
_MODEL = {
    "model_channels": whole(1, 4096),
    "channel_mult": {"type": "array", "items": whole(1, 64), "minItems": 1, "maxItems": 10},
    "num_res_blocks": whole(1, 64),
    "attention_resolutions": {"type": "array", "items": whole(1, 4096), "maxItems": 16},
    "num_heads": whole(1, 1024),
    "norm_groups": whole(1, 4096),
    "dropout": {"type": "number", "minimum": 0, "maximum": 1},
    "use_scale_shift_norm": BOOL,
    "resblock_updown": BOOL,
}
_DATA = {"input": STRING, "trans": STRING, "image_size": whole(1, 16_384)}
_SCORE_MODEL = {
    "model": {"type": "object", "properties": _MODEL, "additionalProperties": False},
    "diffusion": {"type": "object", "properties": {"steps": whole(1, 1_000_000)}},
    "mask": {"type": "object", "properties": {"width": whole(1, 16_384)}},
    "baselines": {"type": "object", "properties": {"latent_channels": whole(1, 4096)}},
}
_GRID = entries(
    axcodes=STRING,
    spacing={"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, "minItems": 3},
    shape={"type": "array", "items": whole(1, 16_384), "minItems": 2},
)
_QUANTILE = {"type": "number", "minimum": 0, "maximum": 1}
EXPERIMENT = entries(
    model_name=STRING,
    training_process={"enum": ["forward", "backward"]},
    config=entries(
        data={"type": "object", "properties": _DATA},
        score_model={"type": "object", "properties": _SCORE_MODEL},
    ),
)
EXPERIMENT["properties"]["data"] = {
    "type": "object",
    "properties": {
        "grid": optional(_GRID),
        "normalisation": optional(entries(percentage_lower=_QUANTILE, percentage_upper=_QUANTILE)),
    },
}

# Of a preprocessed subject, in the folder of its slices.
SUBJECT = entries(
    made_with={
        "type": "object",
        "properties": {"grid": optional(_GRID), "percentage_lower": _QUANTILE, "percentage_upper": _QUANTILE},
    },
    files={"type": "object", "additionalProperties": whole(0, 2**60)},
)


def parse(text: str, schema: Mapping[str, Any]) -> Any:
    """What JSON says, if it fits a schema; a ValueError that says in one line where it does not."""
    try:
        found = json.loads(text, parse_int=_finite(int), parse_float=_finite(float), parse_constant=_finite(float))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(found))
    if error:
        message = error.message if len(error.message) < 150 else f"{error.message[:70]} … {error.message[-70:]}"
        raise ValueError(f"{error.json_path.removeprefix('$.')}: {' '.join(message.split())}")
    return found


def read_json(path: Path, schema: Mapping[str, Any], remedy: str) -> Any:
    """The contents of a JSON file, if they fit a schema; otherwise a UserError with what to do."""
    try:
        return parse(path.read_text(encoding="utf-8"), schema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def _finite(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A reader of a number that refuses those that are none or infinite, as 1e999 is in double precision."""

    def read(text: str) -> int | float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is no finite number")
        return kind(text)

    return read
