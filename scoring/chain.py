"""Which two trained translators make a cycle, and how MMCCD samples: from flags to checkpoints and their config."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import ArgumentParser, UserError, did_you_mean, run_parser
from utils.storage import Folder, local_path


class TrainedTranslator(NamedTuple):
    """A trained translator on disk, and the config of this run with what its training fixed."""

    name: str  # of its experiment, or of a checkpoint without one
    checkpoint: Path
    config: Any  # ConfigDict
    normalisation: dict[str, float] | None  # of the slices that it was trained on, where that is known
    grid: dict[str, Any] | None  # that they lie on, likewise; the JSON of a `utils.grid.SliceGeometry`


class Chain(NamedTuple):
    """The two translators of a cycle. The forward one's config is that of the run."""

    model_name: str  # of the forward translator: unet or diffusion
    forward: TrainedTranslator
    backward: TrainedTranslator

    @property
    def config(self) -> Any:
        return self.forward.config


def chain_parser(description: str, *, on_slices: bool = True) -> ArgumentParser:
    """A parser with the flags that say which translators are chained, and how MMCCD samples."""
    parser = run_parser(description, on_slices=on_slices)
    add = parser.add_argument
    add(
        "--model_name",
        "--model",
        choices=["unet", "diffusion"],
        default="unet",
        help="unet: Cyclic UNet; diffusion: MMCCD",
    )
    for direction, model in (("forward", "{model}"), ("backward", "unet")):
        default = f"{model}_{direction}_{{dataset}}_{{trans}}_{{input}}"
        add(
            f"--experiment_name_{direction}",
            help=f"experiment of the {direction} translator (default: {default})",
        )
        add(
            f"--checkpoint_{direction}",
            type=local_path,
            help="state dict to use (default: the experiment's newest EMA)",
        )
    add(
        "--use_ddim",
        choices=["True", "False"],
        help="DDIM or ancestral sampling (default: the config's, True)",
    )
    add(
        "--sampling",
        choices=["paper", "fast"],
        help="how MMCCD samples: paper, or fast at a small part of the cost (default: the config's, paper)",
    )
    add(
        "--timestep_respacing",
        help="sampling steps; 1000 or empty: all; trailing2 and so on: few, well placed (default: the config's, 100)",
    )
    return parser


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that stand for fields of the config; None where they were not given."""
    return {
        "data.data_dir": getattr(args, "data_dir", None),
        "data.input": args.input,
        "data.trans": args.trans,
        "seed": args.seed,
        "score_model.sampling.use_ddim": None if args.use_ddim is None else args.use_ddim == "True",
        "score_model.sampling.timestep_respacing": args.timestep_respacing,
    }


# What the training of a translator fixes, by the beginning of its key in the config.
HELD_BY_BOTH = ("data.input", "data.trans", "data.image_size")
HELD = {
    "unet": (*HELD_BY_BOTH, "score_model.model."),
    "diffusion": (*HELD_BY_BOTH, "score_model.model.", "score_model.diffusion.", "score_model.mask.width"),
}


def find_chain(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> Chain:
    """The forward and the backward translator that the flags name.

    Raises:
        UserError: as `find_translator`, or a value that no run can work with.
    """
    import config as configs

    config, given = configs.resolve(args.dataset, config_fields(args), overrides)
    forward = find_translator("forward", args, experiments, config, given)
    config = forward.config
    if args.sampling:
        preset = configs.sampling_preset(args.sampling, config.score_model.mask.width)
        config.update_from_flattened_dict({key: value for key, value in preset.items() if key not in given})
    backward = find_translator("backward", args, experiments, config, given | set(HELD_BY_BOTH))
    configs.check(config)
    return Chain(args.model_name, forward, backward)


def find_translator(
    direction: str, args: argparse.Namespace, experiments: Folder, config: Any, given: set[str]
) -> TrainedTranslator:
    """The checkpoint of one direction, and the config with what its experiment's config.json says.

    A checkpoint without a config.json is taken with the config as it is.

    Raises:
        UserError: nothing is there, it is a translator of another kind, or it was trained with settings that
            contradict a `given` key.
    """
    from utils.experiment import RECORD, experiment_name, leaves, read_record, require_name

    model_name = args.model_name if direction == "forward" else "unet"
    checkpoint = getattr(args, f"checkpoint_{direction}")
    if checkpoint is None:
        flag = f"experiment_name_{direction}"
        name = getattr(args, flag) or experiment_name(
            model_name, direction, args.dataset, config.data.trans, config.data.input
        )
        checkpoint = newest_ema(experiments, require_name(f"--{flag}", name))
    elif not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: check --checkpoint_{direction}")
    record = read_record(checkpoint.parent)
    if record is None:
        return TrainedTranslator(checkpoint.stem, checkpoint, config, None, None)
    if not {"model_name", "training_process", "config"} <= set(record):
        raise UserError(f"{checkpoint.parent / RECORD} is not what training writes: restore it")
    if (record["model_name"], record["training_process"]) != (model_name, direction):
        kind = f"{record['training_process']} {record['model_name']}"
        raise UserError(
            f"{checkpoint.parent} is a {kind}, not the {direction} {model_name} that is asked for"
        )
    asked, fixed = dict(leaves(config)), config.copy_and_resolve_references()
    for key, value in leaves(record["config"]):
        if not key.startswith(HELD[model_name]):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if key in given and asked[key] != value:
            raise UserError(
                f"{key}={asked[key]} contradicts {checkpoint.parent}, which was trained with {value}"
            )
        fixed.update_from_flattened_dict({key: value})
    data = record.get("data", {})
    name = checkpoint.absolute().parent.name
    return TrainedTranslator(name, checkpoint, fixed, data.get("normalisation"), data.get("grid"))


def newest_ema(experiments: Folder, name: str) -> Path:
    """The EMA weights of an experiment after the most steps, pulled with its config.json where that is needed.

    Raises:
        UserError: there is no such experiment, or it has saved nothing yet.
    """
    from guided_diffusion.checkpoint import by_step
    from utils.experiment import RECORD

    logdir, directory = experiments.local, experiments.local / name
    experiments.pull(name, RECORD, *by_step(experiments.names(name), "ema_*_")[-1:])
    if not directory.is_dir():
        there = [path.name for path in logdir.iterdir() if path.is_dir()] if logdir.is_dir() else []
        raise UserError(f"no experiment {name!r} in {logdir}{did_you_mean(name, there)}; train it first")
    saved = by_step((path.name for path in directory.iterdir()), "ema_*_")
    if not saved:
        raise UserError(f"experiment {name!r} has no EMA checkpoint in {directory}; train it first")
    return directory / saved[-1]


def require_same_preprocessing(chain: Chain, data_dir: Path | None = None) -> None:
    """Refuse translators, and slices where the run has any, whose intensities or pixels mean different things.

    Raises:
        UserError: the slices of the run, or those that one of them was trained on, were normalised otherwise, or lie
            on another grid. What nobody recorded is taken to be right.
    """
    from datasets.records import read_grid, read_normalisation

    for what, read, remedy in (
        ("normalisation", read_normalisation, "with the same --percentage_lower and --percentage_upper"),
        ("grid", read_grid, "volumes of the same orientation, voxel size and shape, or all of them by --csv"),
    ):
        known = {str(found.checkpoint): getattr(found, what) for found in (chain.forward, chain.backward)}
        if data_dir:
            known[str(data_dir)] = read(data_dir)
        known = {where: value for where, value in known.items() if value}
        (first, expected), *others = known.items() or [("", None)]
        for where, value in others:
            if value != expected:
                raise UserError(
                    f"{first} and {where} do not fit: the {what} of their slices is {expected} and {value}; "
                    f"preprocess {remedy}"
                )


def results_name(chain: Chain) -> str:
    """The folder of a test run: what was chained, and how it was sampled."""
    name = f"{chain.forward.name}__{chain.backward.name}"
    return name if chain.model_name == "unet" else f"{name}__{sampling_name(chain.config)}"


def sampling_name(config: Any) -> str:
    """How MMCCD sampled, for the name of its results: `fast`, `ddim100`, `ancestral1000`, `ddim10_stride8`, …"""
    from config import sampling_preset
    from guided_diffusion.respace import space_timesteps
    from utils.experiment import leaves

    sampling = config.score_model.sampling
    paper, fast = (sampling_preset(name, config.score_model.mask.width) for name in ("paper", "fast"))
    if sampling.use_ddim and fast.items() <= dict(leaves(config)).items():
        return "fast"
    steps = space_timesteps(config.score_model.diffusion.steps, sampling.timestep_respacing)
    name = f"{'ddim' if sampling.use_ddim else 'ancestral'}{len(steps)}"
    if sampling.timestep_respacing.startswith("trailing"):
        name += "_trailing"
    if sampling.stride != paper["score_model.sampling.stride"]:
        name += f"_stride{sampling.stride}"
    if sampling.average != paper["score_model.sampling.average"]:
        name += f"_{sampling.average}"
    return name
