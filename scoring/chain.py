"""Which two trained translators make a cycle, and how MMCCD samples: from flags to checkpoints and their config."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models import METHODS, load_method, method_help
from utils.cli import ArgumentParser, UserError, config_fields, did_you_mean, run_parser
from utils.storage import Folder, local_path


class TrainedTranslator(NamedTuple):
    """A trained translator on disk, and the config of this run with what its training fixed."""

    name: str  # of its experiment, or of a checkpoint without one
    checkpoint: Path
    config: Any  # ConfigDict
    preprocessing: dict[str, Any]  # of the slices that it was trained on, as in `read_preprocessing`


class Chain(NamedTuple):
    """The translators of a cycle, or the only one of a way without return. The forward one's config is the run's."""

    model_name: str  # of the forward translator
    forward: TrainedTranslator
    backward: TrainedTranslator | None  # none for a baseline, which ends where it began, and for the one-way score

    @property
    def config(self) -> Any:
        return self.forward.config

    @property
    def translators(self) -> dict[str, TrainedTranslator]:
        return {"forward": self.forward} | ({"backward": self.backward} if self.backward else {})

    @property
    def checkpoints(self) -> dict[str, Path]:
        return {direction: translator.checkpoint for direction, translator in self.translators.items()}

    @property
    def reference(self) -> str:
        """The modality that the end of the cycle is compared with."""
        return self.config.data.input if self.backward else self.config.data.trans

    @property
    def method(self) -> str:
        """The name in metrics.json: that of the cycle or baseline, or of the one-way score."""
        entry = METHODS[self.model_name]
        return f"one_way_{self.model_name}" if entry.translates and not self.backward else entry.key


def chain_parser(description: str, *, on_slices: bool = True) -> ArgumentParser:
    """A parser with the flags that say which translators are chained, and how MMCCD samples."""
    parser = run_parser(description, on_slices=on_slices)
    add = parser.add_argument
    add("--model_name", "--model", default="unet", choices=METHODS, help=method_help())
    one_way = (
        "what is scored: the error of the cycle, or that of the translation, where the other modality is there, too"
    )
    add("--score", default="cycle", choices=["cycle", "one_way"], help=one_way)
    others = "".join(f"; of {name}: {one.backward}" for name, one in METHODS.items() if one.backward)
    for direction, model in (("forward", "--model_name"), ("backward", f"--model_name{others}")):
        default = f"(default: {{model}}_{direction}_{{dataset}}_{{trans}}_{{input}}; model: {model})"
        add(f"--experiment_name_{direction}", help=f"experiment of the {direction} translator {default}")
        newest = "state dict to use (default: the experiment's newest EMA)"
        add(f"--checkpoint_{direction}", type=local_path, help=newest)
    add("--use_ddim", choices=["True", "False"], help="DDIM or ancestral sampling (default: the config's, True)")
    add(
        "--sampling",
        choices=["paper", "fast"],
        help="how MMCCD samples: paper, or fast at a small part of the cost (default: the config's, paper)",
    )
    add(
        "--timestep_respacing",
        help="sampling steps; 1000 or empty: all; trailing2 and so on: few, well placed (default: the config's, 100)",
    )
    smooth = "median filter of the scores, 3 or 5 px wide (default: the config's, none; fast has its own)"
    add("--smooth", choices=["none", "median3", "median5"], help=smooth)
    return parser


def score_grid(args: argparse.Namespace, overrides: list[str]) -> list[Any]:
    """The scores, `ScoreSettings`, of which validation slices choose one: `score_model.scoring` of the config.

    Raises:
        UserError: if the config names a score that is not known.
    """
    import config as configs
    from evaluation.scores import parse_grid

    config, _ = configs.resolve(args.dataset, {}, overrides, preset=args.preset)
    try:
        return parse_grid(config.score_model.scoring)
    except ValueError as error:
        raise UserError(f"score_model.scoring.{error}") from error


def find_chain(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> Chain:
    """The forward and, for a cycle, the backward translator that the flags name.

    A UserError as from `find_translator`, or for a value that no run can work with.
    """
    method, entry = load_method(args.model_name), METHODS[args.model_name]
    if args.score == "one_way" and not entry.translates:
        raise UserError(f"--model_name {args.model_name} translates to no other modality: leave out --score one_way")
    import config as configs

    sampling = {
        "score_model.sampling.use_ddim": None if args.use_ddim is None else args.use_ddim == "True",
        "score_model.sampling.timestep_respacing": args.timestep_respacing,
        "score_model.sampling.smooth": args.smooth,
    }
    config, given = configs.resolve(
        args.dataset, config_fields(args) | sampling, overrides, args.model_name, args.preset
    )
    forward = find_translator("forward", args, experiments, config, given)
    config = forward.config
    preset = method.sampling_defaults(config, args.sampling)
    config.update_from_flattened_dict({key: value for key, value in preset.items() if key not in given})
    backward = None
    if args.score == "cycle" and entry.translates:
        backward = find_translator("backward", args, experiments, config, given | set(method.ALWAYS_FIXED))
    configs.check(config, args.model_name)
    return Chain(args.model_name, forward, backward)


def chain_of_run(run: Mapping[str, Any], experiments: Folder) -> Chain:
    """Find the translators of a cycle or baseline, and its sampling, from a combined run's record of it.

    Raises:
        UserError: if a checkpoint is not where experiments are, or the record does not fit it.
    """
    model_name, entry = next((name, one) for name, one in METHODS.items() if one.key == run["method"])
    flags = [f"--model_name={model_name}", f"--input={run['input']}"]
    flags += [f"--trans={run['trans']}"] if entry.translates else []
    for direction, address in run["checkpoints"].items():
        *_, name, file = address.split("/")
        experiments.pull(name, "config.json", file)
        flags.append(f"--checkpoint_{direction}={experiments.local / name / file}")
    sampling = dict(run["sampling_settings"])
    overrides = [f"--config.seed={sampling.pop('seed')}"] if "seed" in sampling else []
    if "noise_timestep" in sampling:
        overrides.append(f"--config.score_model.baselines.noise_timestep={sampling.pop('noise_timestep')}")
    overrides += [f"--config.score_model.sampling.{key}={value}" for key, value in sampling.items()]
    return find_chain(chain_parser("").parse_args(flags), overrides, experiments)


def network_of(model_name: str, direction: str) -> str:
    """Return the `--model_name` of the network that a method uses in one direction."""
    return (direction == "backward" and METHODS[model_name].backward) or model_name


def find_translator(
    direction: str, args: argparse.Namespace, experiments: Folder, config: Any, given: set[str]
) -> TrainedTranslator:
    """The checkpoint of one direction, and the config with what its experiment's config.json says.

    A checkpoint without a config.json is taken with the config as it is. A UserError if nothing is there, it is a
    translator of another kind, or it was trained with settings that contradict a `given` key.
    """
    from guided_diffusion.checkpoint import EMA, saved
    from utils.experiment import RECORD, experiment_name, flatten, read_record, require_name

    model_name = network_of(args.model_name, direction)
    flag, checkpoint = f"experiment_name_{direction}", getattr(args, f"checkpoint_{direction}")
    if checkpoint is None:
        kind = (model_name, direction, args.dataset, config.data.trans, config.data.input)
        name = require_name(f"--{flag}", getattr(args, flag) or experiment_name(*kind))
        checkpoint = newest_ema(experiments, name, reverse_cycle(args, config, experiments))
    elif not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: check --checkpoint_{direction}")
    record = read_record(checkpoint.parent)
    if record is None:
        return TrainedTranslator(checkpoint.stem, checkpoint, config, {})
    trained = dict(flatten(record["config"]))
    if record["training_process"] != direction:  # the same mapping, seen from the cycle the other way around
        trained |= {"data.input": trained.get("data.trans"), "data.trans": trained.get("data.input")}
    asked, fixed = dict(flatten(config)), config.copy_and_resolve_references()
    same_mapping = all(trained.get(key) == asked[key] for key in ("data.input", "data.trans"))
    if record["model_name"] != model_name or not (record["training_process"] == direction or same_mapping):
        kind = f"{record['training_process']} {record['model_name']}"
        raise UserError(f"{checkpoint.parent} is a {kind}, not the {direction} {model_name} that is asked for")
    method = load_method(model_name)
    for key, value in trained.items():
        if not key.startswith((*method.ALWAYS_FIXED, *method.fixed)):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if key in given and asked[key] != value:
            raise UserError(f"{key}={asked[key]} contradicts {checkpoint.parent}, which was trained with {value}")
        try:
            fixed.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{checkpoint.parent / RECORD} is damaged ({key}={value!r}): restore it") from error
    name = checkpoint.absolute().parent.name
    if checkpoint.name not in list(saved(checkpoint.parent, EMA).values())[-1:]:
        name += f"_{checkpoint.stem}"  # two checkpoints of an experiment have results of their own
    return TrainedTranslator(name, checkpoint, fixed, record.get("data", {}))


def reverse_cycle(args: argparse.Namespace, config: Any, experiments: Folder) -> str:
    """The flags that take the UNets of the cycle in the other direction, if these are there."""
    from guided_diffusion.checkpoint import EMA, saved
    from utils.experiment import experiment_name

    entry = METHODS[args.model_name]
    turned = {"forward": "backward", "backward": "forward"}
    if entry.backward:  # only the backward translator has a counterpart in the other cycle
        del turned["forward"]
    kind = (args.dataset, config.data.input, config.data.trans)
    names = {here: experiment_name(entry.backward or args.model_name, there, *kind) for here, there in turned.items()}
    if not entry.translates or not all(saved(experiments.local / name, EMA) for name in names.values()):
        return ""
    flags = (f"--experiment_name_{here}={name}" for here, name in names.items())
    return f", or chain the networks of the other direction by {' '.join(flags)}"


def newest_ema(experiments: Folder, name: str, remedy: str = "") -> Path:
    """The EMA weights of an experiment after the most steps, pulled with its config.json where that is needed.

    A UserError if there is no such experiment, which ends in `remedy`, or it has saved nothing yet.
    """
    from guided_diffusion.checkpoint import EMA, saved
    from utils.experiment import RECORD

    logdir, directory = experiments.local, experiments.local / name
    experiments.pull(name, RECORD, *list(saved(experiments.names(name), EMA).values())[-1:])
    if not directory.is_dir():
        there = [path.name for path in logdir.iterdir() if path.is_dir()] if logdir.is_dir() else []
        raise UserError(f"no experiment {name!r} in {logdir}{did_you_mean(name, there)}; train it first{remedy}")
    averages = saved(directory, EMA)
    if not averages:
        raise UserError(f"experiment {name!r} has no EMA checkpoint in {directory}; train it first")
    return directory / averages[max(averages)]


def require_same_preprocessing(chain: Chain, data_dir: Path | None = None) -> None:
    """Refuse translators, and slices where the run has any, whose intensities or pixels mean different things.

    Raises:
        UserError: the slices of the run, or those that one of them was trained on, were normalised otherwise, or lie
            on another grid. What nobody recorded is taken to be right.
    """
    from datasets.records import read_preprocessing

    found = {str(one.checkpoint): one.preprocessing for one in chain.translators.values()}
    if data_dir:
        found[str(data_dir)] = read_preprocessing(data_dir)
    remedies = {
        "normalisation": "with the same --percentage_lower and --percentage_upper",
        "grid": "volumes of the same orientation, voxel size and shape, or all of them by --csv",
    }
    for what, remedy in remedies.items():
        known = [(where, made_with[what]) for where, made_with in found.items() if made_with.get(what)]
        for where, value in known[1:]:
            first, expected = known[0]
            if value != expected:
                raise UserError(
                    f"{first} and {where} do not fit: the {what} of their slices is {expected} and {value}; "
                    f"preprocess {remedy}"
                )


def results_name(chain: Chain) -> str:
    """The folder of a test run: what was chained, and how it was sampled."""
    how = load_method(chain.model_name).results_suffix(chain.config)
    one_way = "one_way" if chain.method.startswith("one_way") else ""
    return "__".join(filter(None, (*(one.name for one in chain.translators.values()), one_way, how)))
