"""The trained translators of a run: from command-line flags to checkpoints and the config they were trained with."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models import METHODS, load_method, method_help
from utils.cli import ArgumentParser, UserError, config_fields, did_you_mean, run_parser
from utils.storage import Folder, local_path


class TrainedTranslator(NamedTuple):
    """A trained translator on disk, and this run's config with the settings that training fixed."""

    name: str  # of its experiment; without one, the checkpoint's file name
    checkpoint: Path
    config: Any  # ConfigDict
    preprocessing: dict[str, Any]  # of the training slices, as returned by `read_preprocessing`


class Chain(NamedTuple):
    """The translators of a cycle, or the only network of a baseline or a one-way score."""

    model_name: str  # of the forward translator
    forward: TrainedTranslator
    backward: TrainedTranslator | None  # None for baselines and one-way scores

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
    def weights(self) -> dict[str, str]:
        """The hash of each translator's weights."""
        from guided_diffusion.checkpoint import digest

        return {direction: digest(path) for direction, path in self.checkpoints.items()}

    @property
    def reference(self) -> str:
        """The modality that the output is compared with."""
        return self.config.data.input if self.backward else self.config.data.trans

    @property
    def method(self) -> str:
        """The method's name in metrics.json."""
        entry = METHODS[self.model_name]
        return f"one_way_{self.model_name}" if entry.translates and not self.backward else entry.key


def chain_parser(description: str, *, on_slices: bool = True) -> ArgumentParser:
    """Return a parser with the flags that select the translators and how MMCCD samples."""
    parser = run_parser(description, on_slices=on_slices)
    add = parser.add_argument
    add("--model_name", "--model", default="unet", choices=METHODS, help=method_help())
    score = "score the error of the whole cycle, or of the translation alone, which needs scans of both modalities"
    add("--score", default="cycle", choices=["cycle", "one_way"], help=score)
    exceptions = "".join(f", but {one.backward} for {name}" for name, one in METHODS.items() if one.backward)
    for direction, model in (("forward", "--model_name"), ("backward", f"--model_name{exceptions}")):
        default = f"(default: {{model}}_{direction}_{{dataset}}_{{trans}}_{{input}}; model: {model})"
        add(f"--experiment_name_{direction}", help=f"experiment of the {direction} translator {default}")
        newest = "state dict to load (default: the experiment's newest EMA weights)"
        add(f"--checkpoint_{direction}", type=local_path, help=newest)
    add("--use_ddim", choices=["True", "False"], help="DDIM or ancestral sampling (default: the config's, True)")
    preset = "sampling preset of MMCCD; fast takes a fraction of the network passes (default: the config's, paper)"
    add("--sampling", choices=["paper", "fast"], help=preset)
    steps = "sampling steps; 1000 or empty for all, trailing2 for two down from the last (default: the config's, 100)"
    add("--timestep_respacing", help=steps)
    smooth = "median filter of the scores, 3 or 5 px wide (default: the config's, none, or that of --sampling fast)"
    add("--smooth", choices=["none", "median3", "median5"], help=smooth)
    return parser


def scoring_options(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of scoring error maps, as keyword arguments of `score_maps`.

    Returns:
        grid: the scores that validation slices choose from, `ScoreSettings`; healthy_share: of the threshold `healthy`.

    Raises:
        UserError: if the config contains an unknown score setting or an invalid share.
    """
    import config as configs
    from evaluation.scores import parse_grid

    config, _ = configs.resolve(args.dataset, {}, overrides, preset=args.preset)
    try:
        grid = parse_grid(config.score_model.scoring)
    except ValueError as error:
        raise UserError(f"score_model.scoring.{error}") from error
    if not 0 <= (share := config.score_model.threshold.healthy_share) <= 0.5:
        raise UserError(f"score_model.threshold.healthy_share={share} must be between 0 and 0.5")
    return {"grid": grid, "healthy_share": share}


def find_chain(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> Chain:
    """Find the forward and, for a cycle, the backward translator that the flags select.

    Raises:
        UserError: as from `find_translator`, or if a config value is invalid.
    """
    method, entry = load_method(args.model_name), METHODS[args.model_name]
    if args.score == "one_way" and not entry.translates:
        raise UserError(f"--model_name {args.model_name} reconstructs its input: leave out --score one_way")
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


def reload_chain(run: Mapping[str, Any], experiments: Folder) -> Chain:
    """Find the translators and the sampling recorded for one member of a combined run.

    Raises:
        UserError: if a checkpoint is missing from the experiments, or does not match the record.
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
    if run.get("precision") == "float32":  # lower ones depend on the device
        overrides.append("--config.precision=float32")
    if "noise_timestep" in sampling:
        overrides.append(f"--config.score_model.baselines.noise_timestep={sampling.pop('noise_timestep')}")
    overrides += [f"--config.score_model.sampling.{key}={value}" for key, value in sampling.items()]
    chain = find_chain(chain_parser("").parse_args(flags), overrides, experiments)
    require_tested_weights(chain, run, run["run"], "test it again, and combine the runs again")
    return chain


def require_tested_weights(chain: Chain, run: Mapping[str, Any], source: Any, remedy: str) -> None:
    """Check that a test run, described by metrics.json, was computed with the contents of the chain's checkpoints.

    Raises:
        UserError: otherwise, because scores and thresholds do not carry over to other weights.
    """
    tested, current = run.get("weights"), chain.weights
    changed = [str(path) for key, path in chain.checkpoints.items() if tested and tested.get(key) != current[key]]
    if changed:
        raise UserError(f"{source} was computed with other weights than are now in {' and '.join(changed)}: {remedy}")
    if not tested:
        print(f"warning: {source} is from an earlier version, which did not record the weights; assuming the same")


def network_name(model_name: str, direction: str) -> str:
    """Return the `--model_name` of the network that a method uses in one direction."""
    return (direction == "backward" and METHODS[model_name].backward) or model_name


def find_translator(
    direction: str, args: argparse.Namespace, experiments: Folder, config: Any, given: set[str]
) -> TrainedTranslator:
    """Find the checkpoint of one direction, and update the config from its experiment's config.json, if there is one.

    Raises:
        UserError: if there is no checkpoint, it holds another kind of translator, or its training contradicts a config
            key that the user has `given`.
    """
    from guided_diffusion.checkpoint import EMA_PREFIX, list_checkpoints
    from utils.experiment import RECORD, experiment_name, flatten, read_record, require_name

    model_name = network_name(args.model_name, direction)
    flag, checkpoint = f"experiment_name_{direction}", getattr(args, f"checkpoint_{direction}")
    if checkpoint is None:
        kind = (model_name, direction, args.dataset, config.data.trans, config.data.input)
        name = require_name(f"--{flag}", getattr(args, flag) or experiment_name(*kind))
        checkpoint = newest_ema(experiments, name, opposite_cycle_hint(args, config, experiments))
    elif not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: check --checkpoint_{direction}")
    record = read_record(checkpoint.parent)
    if record is None:
        return TrainedTranslator(checkpoint.stem, checkpoint, config, {})
    trained = dict(flatten(record["config"]))
    if record["training_process"] != direction:  # the same mapping, trained for the opposite cycle
        trained |= {"data.input": trained.get("data.trans"), "data.trans": trained.get("data.input")}
    asked, fixed = dict(flatten(config)), config.copy_and_resolve_references()
    same_mapping = all(trained.get(key) == asked[key] for key in ("data.input", "data.trans"))
    if record["model_name"] != model_name or not (record["training_process"] == direction or same_mapping):
        kind = f"{record['training_process']} {record['model_name']}"
        raise UserError(f"{checkpoint.parent} is a {kind}, not the {direction} {model_name} needed here")
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
    if checkpoint.name not in list(list_checkpoints(checkpoint.parent, EMA_PREFIX).values())[-1:]:
        name += f"_{checkpoint.stem}"  # keeps its results apart from those of the newest EMA
    return TrainedTranslator(name, checkpoint, fixed, record.get("data", {}))


def opposite_cycle_hint(args: argparse.Namespace, config: Any, experiments: Folder) -> str:
    """Return advice to use the networks of the opposite cycle, or an empty string if these are not trained."""
    from guided_diffusion.checkpoint import EMA_PREFIX, list_checkpoints
    from utils.experiment import experiment_name

    entry = METHODS[args.model_name]
    trained_as = {"forward": "backward", "backward": "forward"}
    if entry.backward:  # only the backward translator has a counterpart in the opposite cycle
        del trained_as["forward"]
    model_name, kind = entry.backward or args.model_name, (args.dataset, config.data.input, config.data.trans)
    names = {role: experiment_name(model_name, trained, *kind) for role, trained in trained_as.items()}
    missing = [name for name in names.values() if not list_checkpoints(experiments.local / name, EMA_PREFIX)]
    if missing or not entry.translates:
        return ""
    flags = (f"--experiment_name_{role}={name}" for role, name in names.items())
    return f", or use the networks of the opposite cycle: {' '.join(flags)}"


def newest_ema(experiments: Folder, name: str, remedy: str = "") -> Path:
    """Return the path of an experiment's newest EMA weights, pulled with its config.json from object storage.

    Raises:
        UserError: if there is no such experiment (that message ends with `remedy`), or it has no EMA weights yet.
    """
    from guided_diffusion.checkpoint import EMA_PREFIX, list_checkpoints
    from utils.experiment import RECORD

    logdir, directory = experiments.local, experiments.local / name
    experiments.pull(name, RECORD, *list(list_checkpoints(experiments.list_files(name), EMA_PREFIX).values())[-1:])
    if not directory.is_dir():
        known = [path.name for path in logdir.iterdir() if path.is_dir()] if logdir.is_dir() else []
        raise UserError(f"no experiment {name!r} in {logdir}{did_you_mean(name, known)}; train it first{remedy}")
    averages = list_checkpoints(directory, EMA_PREFIX)
    if not averages:
        raise UserError(f"experiment {name!r} has no EMA checkpoint in {directory}; train it first")
    return directory / averages[max(averages)]


def require_same_preprocessing(chain: Chain, data_dir: Path | None = None) -> None:
    """Check that all translators were trained on slices of the same normalisation and grid as those in `data_dir`.

    Raises:
        UserError: if two records differ. Missing records are assumed to match.
    """
    from datasets.records import read_preprocessing

    found = {str(one.checkpoint): one.preprocessing for one in chain.translators.values()}
    if data_dir:
        found[str(data_dir)] = read_preprocessing(data_dir)
    remedies = {
        "normalisation": "with the same --percentage_lower and --percentage_upper",
        "grid": "volumes of the same orientation, voxel size and shape, or all of them with --csv",
    }
    for key, remedy in remedies.items():
        recorded = [(source, made_with[key]) for source, made_with in found.items() if made_with.get(key)]
        for source, value in recorded[1:]:
            first, expected = recorded[0]
            if value != expected:
                differences = f"the {key} of their slices is {expected} and {value}"
                raise UserError(f"{first} and {source} do not match: {differences}; preprocess {remedy}")


def results_name(chain: Chain) -> str:
    """Return the name of a test run's results folder: its translators, the score if one-way, and the sampling."""
    sampling = load_method(chain.model_name).results_suffix(chain.config)
    one_way = "one_way" if chain.method.startswith("one_way") else ""
    return "__".join(filter(None, (*(one.name for one in chain.translators.values()), one_way, sampling)))
