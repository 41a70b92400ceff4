"""Settings: one config for each data set, overridden from the command line by `--config.KEY=VALUE`."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from models import METHODS, load_method
from utils.cli import UserError, did_you_mean
from utils.device import PRECISIONS
from utils.experiment import flatten, require_name

from . import brats_config, phantom_config

CONFIGS = {"brats": brats_config.get_config, "phantom": phantom_config.get_config}
# How a score is made of the draws of each pixel (see models/cycle.py), and smoothed (see evaluation/metrics.py).
SCORING = {"score": ("errors", "reconstructions", "standardised"), "smooth": ("none", "median3", "median5")}
MODALITIES = ("flair", "t1", "t1ce", "t2")


def get_config(dataset: str) -> ConfigDict:
    """The settings for `dataset`, locked: values can be changed, keys cannot be added.

    A UserError for an unknown data set.
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
    """The config of a run: the data set's, then the flags that were given, then `--config.KEY=VALUE`.

    Args:
        dataset: name of the config.
        flags_given: dotted key of the config to the flag's value, None where the flag was not given.
        overrides: arguments of the form `--config.KEY=VALUE`.
        model_name: of the forward translator. A baseline translates the input modality to itself.
        preset: size of network, images and training, `paper` or `small`; None: the data set's own.

    Returns:
        The config, locked, and the keys that the user set.

    A UserError as from `get_config` and `override`, or for a target modality that a baseline has not.
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
    """Apply command-line arguments of the form `--config.KEY=VALUE` to a locked config, in place.

    Returns:
        The keys that were set.

    A UserError for an unknown key (the nearest known one is named), or a value of the wrong type.
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
    """Refuse values that no run of `model_name` can work with, before anything is written.

    A UserError names the first value that is out of range.
    """
    data, score_model = config.data, config.score_model
    model, width = score_model.model, score_model.mask.width
    for flag, modality in (("--input", data.input), ("--trans", data.trans)):
        require_name(flag, modality)
    if data.input == data.trans and METHODS[model_name].translates:
        raise UserError(f"--input and --trans are both {data.input!r}: a translation needs two modalities")
    if not model.channel_mult:
        raise UserError("score_model.model.channel_mult is empty: give the width of at least one level")
    names = {"precision": ("auto", *PRECISIONS)} | {
        f"score_model.sampling.{key}": known for key, known in SCORING.items()
    }
    values = dict(flatten(config))
    for key, known in names.items():
        if values[key] not in known:
            raise UserError(f"{key}={values[key]!r} is not known: choose one of {', '.join(known)}")
    bounds = _BOUNDS | {"score_model.mask.width": (1, data.image_size)} | load_method(model_name).bounds(config)
    for key, (least, most) in bounds.items():
        if not least <= values[key] <= most:
            allowed = f"be at least {least}" if most == inf else f"lie in {least} … {most}"
            raise UserError(f"{key}={values[key]} must {allowed}")
    for mult in model.channel_mult:
        if not isinstance(mult, int) or mult < 1:
            raise UserError(f"score_model.model.channel_mult holds {mult!r}: use whole numbers from 1 on")
        if mult * model.model_channels % model.norm_groups:
            raise UserError(
                f"score_model.model.norm_groups={model.norm_groups} does not divide the "
                f"{mult * model.model_channels} channels of a level (model_channels × channel_mult)"
            )
    for rate in model.attention_resolutions:
        if not isinstance(rate, int) or rate < 1 or rate & (rate - 1):
            raise UserError(
                f"score_model.model.attention_resolutions holds {rate!r}: use downsampling rates, 1, 2, 4, 8 and so on"
            )
    halvings = len(model.channel_mult) - 1
    if data.image_size % 2**halvings:
        raise UserError(
            f"data.image_size={data.image_size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"score_model.model.channel_mult ask: use a multiple of {2**halvings}"
        )
    for section in ("mask", "sampling"):
        stride = score_model[section].stride
        if not 1 <= stride <= width:
            raise UserError(f"score_model.{section}.stride={stride} must lie in 1 … mask.width, or pixels go unseen")


# The least and the most that a number may be.
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
