"""Settings: one config per data set, overridden from the command line with `--config.KEY=VALUE`."""

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from models import METHODS, load_method
from utils.cli import UserError, did_you_mean
from utils.device import PRECISIONS
from utils.experiment import flatten, require_name
from utils.records import EXPERIMENT, parse

from . import brats_config, phantom_config

CONFIGS = {"brats": brats_config.get_config, "phantom": phantom_config.get_config}
# Settings that have named values; for the scores see models/cycle.py, for their smoothing evaluation/scores.py.
_CHOICES = {
    "precision": ("auto", *PRECISIONS),
    "score_model.sampling.score": ("errors", "reconstructions", "standardised"),
    "score_model.sampling.smooth": ("none", "median3", "median5"),
}
MODALITIES = ("flair", "t1", "t1ce", "t2")


def get_config(dataset: str) -> ConfigDict:
    """Return the config for `dataset`, locked: values can be changed, keys cannot be added.

    Raises:
        UserError: if the data set is unknown.
    """
    if dataset in MODALITIES:
        raise UserError(
            f"--dataset {dataset!r} is a modality, use --input {dataset} with --dataset {'|'.join(CONFIGS)}"
        )
    if dataset not in CONFIGS:
        raise UserError(f"unknown --dataset {dataset!r}{did_you_mean(dataset, CONFIGS)} (known: {', '.join(CONFIGS)})")
    return CONFIGS[dataset]().lock()


def resolve(
    dataset: str,
    flags_given: Mapping[str, Any],
    overrides: Sequence[str],
    model_name: str = "unet",
    preset: str | None = None,
) -> tuple[ConfigDict, set[str]]:
    """Return the config of a run, locked, and the keys set by the user.

    Flags override the data set's config, and `--config.KEY=VALUE` overrides flags.

    Args:
        dataset: name of the config.
        flags_given: values of flags by dotted config key, None for flags that were not given.
        overrides: arguments of the form `--config.KEY=VALUE`.
        model_name: of the forward translator. A baseline translates the input modality to itself.
        preset: size of network, images and training, `paper` or `small`; None: the data set's own.

    Raises:
        UserError: as from `get_config` and `override`, or if a target modality is set for a baseline.
    """
    config = get_config(dataset)
    if preset:
        sized = brats_config.get_config()
        sized = phantom_config.make_small(sized) if preset == "small" else sized
        sized.data.data_dir = config.data.data_dir
        config = sized.lock()
    given = {key: value for key, value in flags_given.items() if value is not None}
    config.update_from_flattened_dict(given)
    keys = {*given, *override(config, overrides)}
    if not METHODS[model_name].translates:
        if "data.trans" in keys:
            raise UserError(f"--model_name {model_name} reconstructs the input modality itself: leave out --trans")
        config.data.trans = config.data.input
    return config, keys


def override(config: ConfigDict, arguments: Sequence[str]) -> list[str]:
    """Apply command-line arguments of the form `--config.KEY=VALUE` to a locked config, in place; return their keys.

    Raises:
        UserError: if a key is unknown (the message suggests the nearest one) or a value has the wrong type.
    """
    known, given = dict(flatten(config)), []
    for argument in arguments:
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if key not in known:
            raise UserError(f"unknown config key {key!r}{did_you_mean(key, known)}")
        if not equals:
            raise UserError(f"--config.{key} needs a value: write --config.{key}=VALUE")
        parsed = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=["", argument])
            parsed(["", argument])
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(f"--config.{key}={text} is not of type {type(known[key]).__name__}") from error
        given.append(key)
    return given


def check(config: ConfigDict, model_name: str = "unet") -> None:
    """Validate the settings of a run of `model_name`, before it writes anything.

    Raises:
        UserError: if a value is invalid; the message names the first one.
    """
    data, score_model = config.data, config.score_model
    model, width = score_model.model, score_model.mask.width
    for flag, modality in (("--input", data.input), ("--trans", data.trans)):
        require_name(flag, modality)
        if modality in ("seg", "brainmask"):
            raise UserError(f"{flag} {modality!r} is a mask: name a modality")
    if data.input == data.trans and METHODS[model_name].translates:
        raise UserError(f"--input and --trans are both {data.input!r}: a translation needs two modalities")
    if not model.channel_mult:
        raise UserError("score_model.model.channel_mult is empty: give the width of at least one level")
    values = dict(flatten(config))
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key}={values[key]!r} must be one of {', '.join(choices)}")
    bounds = _BOUNDS | {"score_model.mask.width": (1, data.image_size)} | load_method(model_name).bounds(config)
    for key, (least, most) in bounds.items():
        if not least <= values[key] <= most:
            allowed = f"be at least {least}" if most == inf else f"be between {least} and {most}"
            raise UserError(f"{key}={values[key]} must {allowed}")
    for mult in model.channel_mult:
        if not isinstance(mult, int) or mult < 1:
            raise UserError(f"score_model.model.channel_mult holds {mult!r}: use integers of at least 1")
        if mult * model.model_channels % model.norm_groups:
            raise UserError(
                f"score_model.model.norm_groups={model.norm_groups} does not divide the "
                f"{mult * model.model_channels} channels of a level (model_channels × channel_mult)"
            )
    for rate in model.attention_resolutions:
        if not isinstance(rate, int) or rate < 1 or rate & (rate - 1):
            allowed = "use downsampling rates, which are powers of two: 1, 2, 4, 8, …"
            raise UserError(f"score_model.model.attention_resolutions holds {rate!r}: {allowed}")
    halvings = len(model.channel_mult) - 1
    if data.image_size % 2**halvings:
        raise UserError(
            f"data.image_size={data.image_size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"score_model.model.channel_mult require: use a multiple of {2**halvings}"
        )
    if data.image_size == 2**halvings and min(model.channel_mult[-2:]) * model.model_channels == model.norm_groups:
        raise UserError(
            f"the last of the {halvings + 1} levels of score_model.model.channel_mult has 1 px, and norm_groups="
            f"{model.norm_groups} leaves one value per group: use fewer levels or groups"
        )
    for section in ("mask", "sampling"):
        stride = score_model[section].stride
        if not 1 <= stride <= width:
            raise UserError(f"score_model.{section}.stride={stride} must be between 1 and mask.width to skip no pixel")
    try:  # upper bounds, far above any real network, beyond which a checkpoint's record would count as damaged
        parse(json.dumps(config.to_dict()), EXPERIMENT["properties"]["config"])
    except ValueError as error:
        raise UserError(f"a setting is invalid: {error}") from error


# Minimum and maximum of the numeric settings.
_BOUNDS = {"seed": (0, 2**32 - 1), "data.image_size": (1, inf)} | {
    f"score_model.{section}.{key}": bounds
    for section, bounds, keys in (
        ("model", (1, inf), ("model_channels", "num_res_blocks", "num_heads", "norm_groups")),
        ("model", (0, 1), ("dropout",)),
        ("diffusion", (1, inf), ("steps",)),
        ("training", (1, inf), ("iterations", "batch_size", "lr_decay_steps", "log_interval", "save_interval")),
        ("training", (0, inf), ("lr", "weight_decay", "lr_decay_factor", "keep_last")),
        ("training", (0, 1), ("ema_rate",)),
        ("baselines", (1, inf), ("latent_channels", "noise_size")),
        ("baselines", (0, inf), ("noise_std",)),
        ("sampling", (1, inf), ("batch_size",)),
        ("sampling", (0, 1), ("eta",)),
    )
    for key in keys
}
