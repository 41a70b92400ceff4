"""Chain a forward and a backward translator and score the cyclic error on the test slices: Dice, AUPRC and more."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import UserError, parse_run_args, run, run_parser

ERROR_MAPS = "error_maps.npz"


def main() -> None:
    args, overrides = parse_args()
    if args.compare:
        from utils.report import comparison

        print(comparison(*args.compare))
    elif args.rescore:
        score_again(args.rescore)
    else:
        score_translators(args, overrides)


def score_translators(args: argparse.Namespace, overrides: list[str]) -> None:
    """Make the error maps of the test and validation slices, and score them."""
    # Only now what takes seconds to import.
    import config as configs
    from utils.device import pick_device
    from utils.experiment import trained_steps
    from utils.report import write_maps

    config, given = configs.resolve(args.dataset, config_flags(args), overrides)
    forward = find_translator("forward", args, config, given)
    config = forward.config
    backward = find_translator("backward", args, config, given | set(HELD_BY_BOTH))
    configs.check(config)
    create_maps = create_scorer(args, forward, backward, pick_device(args.gpu_id))
    slices = {split: load_slices(config, split) for split in ("test", "val")}
    print(f"{config}\nforward:  {forward.checkpoint}\nbackward: {backward.checkpoint}")

    maps = {split: create_maps(batch, split) for split, batch in slices.items() if batch}
    translators = {"forward": forward, "backward": backward}
    run = {
        "method": "mmccd" if args.model_name == "diffusion" else "cyclic_unet",
        "input": config.data.input,
        "trans": config.data.trans,
        "image_size": config.data.image_size,
        "checkpoints": {process: str(found.checkpoint) for process, found in translators.items()},
        "trained_steps": {process: trained_steps(found.checkpoint) for process, found in translators.items()},
    }
    results = Path(args.logdir) / "results" / results_name(args.model_name, forward, backward)
    write_maps(results / ERROR_MAPS, run, maps)
    score_maps(results, run, maps)


def score_again(path: Path) -> None:
    """Score the error maps of an earlier test run, given by its folder or its file of error maps."""
    from utils.report import read_maps

    path = path / ERROR_MAPS if path.is_dir() else path
    score_maps(path.parent, *read_maps(path))


def score_maps(results: Path, run: dict[str, Any], maps: dict[str, dict]) -> None:
    """Score error maps; write metrics.json, per_slice.csv, figures and TensorBoard events, and print the tables.

    Args:
        results: folder of the test run.
        run: what was chained, for the head of metrics.json.
        maps: by split, `names` and arrays [N, H, W], as `utils.report.write_maps` takes them.
    """
    from utils.figures import draw_scores, write_figures
    from utils.metrics import by_lesion_size, evaluate, ranked_scores
    from utils.report import METHODS, size_table, table, write_events, write_scores

    cyclic_error, intensity = (
        evaluate(*labelled(maps["test"], key), val=labelled(maps["val"], key) if "val" in maps else None)
        for key in ("scores", "image")
    )
    metrics, baseline = (
        evaluation.summary | {"by_lesion_size": by_lesion_size(evaluation.per_slice)}
        for evaluation in (cyclic_error, intensity)
    )
    metrics = {**run, **metrics, "baseline_intensity": baseline}
    ranked = {
        METHODS[run["method"]]: ranked_scores(*labelled(maps["test"], "scores")),
        f"intensity ({run['input']})": ranked_scores(*labelled(maps["test"], "image")),
    }
    write_scores(results, metrics, maps["test"]["names"], cyclic_error.per_slice)
    write_figures(results / "figures", draw_scores(maps["test"], metrics, cyclic_error.per_slice, ranked))
    write_events(results, metrics, ranked)
    print(
        f"\n{table([metrics])}\n\n{size_table(metrics)}\n\nresults: {results}\nfigures: {results / 'figures'}"
    )


class Translator(NamedTuple):
    """A trained translator on disk, and the config of this run with what its training fixed."""

    name: str  # of its experiment, or of a checkpoint without one
    checkpoint: Path
    config: Any  # ConfigDict


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = run_parser(__doc__)
    add = parser.add_argument
    add(
        "--model_name",
        "--model",
        choices=["unet", "diffusion"],
        default="unet",
        help="unet: Cyclic UNet; diffusion: MMCCD",
    )
    for process, model in (("forward", "{model}"), ("backward", "unet")):
        default = f"{model}_{process}_{{dataset}}_{{trans}}_{{input}}"
        add(
            f"--experiment_name_{process}",
            help=f"experiment of the {process} translator (default: {default})",
        )
        add(
            f"--checkpoint_{process}",
            type=Path,
            help="state dict to use (default: the experiment's newest EMA)",
        )
    add(
        "--use_ddim",
        choices=["True", "False"],
        help="DDIM or ancestral sampling (default: the config's, True)",
    )
    add("--timestep_respacing", help="sampling steps; 1000 or empty: all (default: the config's, 100)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("RUN_A", "RUN_B"),
        help="only compare the test runs in two folders, slice by slice (paired bootstrap)",
    )
    instead.add_argument(
        "--rescore",
        type=Path,
        metavar="RUN",
        help="only score the error maps in a test run's folder again, without a model",
    )
    return parse_run_args(parser)


def config_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that stand for fields of the config; None where they were not given."""
    return {
        "data.data_dir": args.data_dir,
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


def find_translator(process: str, args: argparse.Namespace, config: Any, given: set[str]) -> Translator:
    """The checkpoint of one direction, and the config with what its experiment's config.json says.

    A checkpoint without a config.json is taken with the config as it is.

    Raises:
        UserError: nothing is there, it is a translator of another kind, or it was trained with settings that
            contradict a `given` key.
    """
    from utils.experiment import experiment_name, leaves, newest_ema, read_record

    model_name = args.model_name if process == "forward" else "unet"
    checkpoint = getattr(args, f"checkpoint_{process}")
    if checkpoint is None:
        name = getattr(args, f"experiment_name_{process}")
        name = name or experiment_name(
            model_name, process, args.dataset, config.data.trans, config.data.input
        )
        checkpoint = newest_ema(Path(args.logdir), name)
    elif not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: check --checkpoint_{process}")
    record = read_record(checkpoint)
    if record is None:
        return Translator(checkpoint.stem, checkpoint, config)
    if not {"model_name", "training_process", "config"} <= set(record):
        raise UserError(f"{checkpoint.parent / 'config.json'} is not what training writes: restore it")
    if (record["model_name"], record["training_process"]) != (model_name, process):
        kind = f"{record['training_process']} {record['model_name']}"
        raise UserError(f"{checkpoint.parent} is a {kind}, not the {process} {model_name} that is asked for")
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
    return Translator(checkpoint.absolute().parent.name, checkpoint, fixed)


def create_scorer(
    args: argparse.Namespace, forward: Translator, backward: Translator, device: Any
) -> Callable[[dict, str], dict]:
    """Load both translators; what comes back turns slices into error maps, arrays [N, H, W] by name.

    Raises:
        UserError: a config that no network or diffusion can be made of, or weights that do not fit it.
    """
    import torch
    from tqdm import tqdm

    from models.build import create_masked_translator, create_network
    from models.cycle import Cycle, cyclic_unet, mmccd
    from models.masks import sweep
    from utils.experiment import load_weights

    config = forward.config
    batch_size = config.score_model.sampling.batch_size
    networks = []
    try:
        for model_name, found in ((args.model_name, forward), ("unet", backward)):
            network = create_network(model_name, found.config.score_model.model)
            load_weights(network, found.checkpoint)
            networks.append(network.eval().to(device))
        if args.model_name == "diffusion":
            masked_translator = create_masked_translator(networks[0], config)
    except ValueError as error:
        raise UserError(str(error)) from error

    def cycle_of(slices: dict, split: str) -> Cycle:
        image = slices[config.data.input].to(device)
        if args.model_name == "diffusion":
            return mmccd(
                image,
                slices["brainmask"].to(device),
                masked_translator,
                networks[1],
                bands=sweep(config.data.image_size, config.score_model.mask.stride),
                batch_size=batch_size,
                progress=lambda batches: tqdm(batches, desc=f"scoring {split}", unit="batch"),
            )
        batches = tqdm(image.split(batch_size), desc=f"scoring {split}", unit="batch")
        parts = [cyclic_unet(batch, *networks) for batch in batches]
        return Cycle(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def score(slices: dict, split: str) -> dict:
        cycle = cycle_of(slices, split)
        maps = {
            "image": slices[config.data.input],
            "translation": cycle.translation,
            "reconstruction": cycle.reconstruction,
            "scores": cycle.score,
            "truth": slices["seg"],
            "brainmask": slices["brainmask"],
        }
        return {"names": slices["name"], **{key: value[:, 0].cpu().numpy() for key, value in maps.items()}}

    return score


def load_slices(config: Any, split: str) -> dict | None:
    """All slices of a split as one batch; None, with a word about it, if there are no validation slices.

    Raises:
        UserError: there are no test slices, or not of the input modality.
    """
    from datasets.brats2021 import BraTS2021Dataset
    from datasets.loader import all_slices

    if split == "val" and not any(Path(config.data.data_dir, split).glob("*/*.npy")):
        print(f"no validation slices in {config.data.data_dir}: only the oracle threshold can be shown")
        return None
    kinds = [config.data.input, "seg", "brainmask"]
    return all_slices(BraTS2021Dataset(config.data.data_dir, split, kinds, config.data.image_size))


def labelled(maps: dict, key: str) -> tuple:
    """Scores, truth and brain mask as `evaluate` takes them, with the array named `key` as the score."""
    return maps[key], maps["truth"], maps["brainmask"]


def results_name(model_name: str, forward: Translator, backward: Translator) -> str:
    """The folder of a test run: what was chained, and how it was sampled."""
    from guided_diffusion.respace import space_timesteps

    name = f"{forward.name}__{backward.name}"
    if model_name == "unet":
        return name
    sampling, steps = forward.config.score_model.sampling, forward.config.score_model.diffusion.steps
    kind = "ddim" if sampling.use_ddim else "ancestral"
    return f"{name}__{kind}{len(space_timesteps(steps, sampling.timestep_respacing))}"


if __name__ == "__main__":
    run(main)
