"""Chain a forward and a backward translator and score the cyclic error on the test slices: Dice, AUPRC and more."""

import argparse
from pathlib import Path

from scoring.chain import chain_parser, find_chain, require_same_preprocessing, results_name, scoring_options
from utils.cli import parse_run_args, run
from utils.storage import Folder, local_path, open_folder

ERROR_FLOOR_SLICES = 64  # training slices that set the error floor if there are no validation slices


def main() -> None:
    args, overrides = parse_args()
    if args.compare:
        from evaluation.tables import comparison

        print(comparison(*args.compare))
    elif args.combine:
        combine_runs(args.combine, scoring_options(args, overrides))
    elif args.rescore:
        rescore(args.rescore, scoring_options(args, overrides))
    else:
        with open_folder(args.logdir) as experiments:
            score_translators(args, overrides, experiments)


def score_translators(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Compute error maps of the test and validation slices, score them, and write the results folder."""
    # Imported here because these take seconds to load.
    from evaluation.report import EVENTS, score_maps
    from evaluation.results import ERROR_MAPS, MapWriter, read_maps
    from guided_diffusion import dist_util
    from guided_diffusion.checkpoint import step_of
    from scoring.scorer import Scorer, create_maps, load_slices, voxel_size
    from scoring.selection import best_on_validation
    from utils.device import pick_device
    from utils.experiment import describe_run, write_record
    from utils.files import replaced

    dist_util.setup()
    experiments.writable = dist_util.rank() == 0
    chain = find_chain(args, overrides, experiments)
    config, options = chain.config, scoring_options(args, overrides)
    require_same_preprocessing(chain, Path(config.data.data_dir))
    device = pick_device(dist_util.gpu_id(args.gpu_id), config.deterministic)
    scorer, name = Scorer(chain, device), results_name(chain)
    slices = {split: load_slices(chain, split) for split in ("test", "val")}
    if slices["val"] is None:
        slices["train"] = load_slices(chain, "train", ERROR_FLOOR_SLICES)
    if args.select == "validation":
        chain, name = best_on_validation(chain, experiments, slices["val"], device), f"{name}__selected"
        scorer = Scorer(chain, device)
    checkpoints = {direction: experiments.address(path) for direction, path in chain.checkpoints.items()}
    print(config, *(f"{direction + ':':9} {address}" for direction, address in checkpoints.items()), sep="\n")

    slices = {split: parts for split, parts in slices.items() if parts}
    if not experiments.writable:
        create_maps(scorer, slices, lambda split, part: None)
        dist_util.shut_down()
        return
    results, size = experiments.local / "results" / name, voxel_size(chain)
    with replaced(results, "--logdir", [EVENTS]) as new:
        writer = MapWriter(new / ERROR_MAPS)
        cost = create_maps(scorer, slices, writer.add, size)
        dist_util.shut_down()
        run = {
            "method": chain.method,
            "input": config.data.input,
            "trans": config.data.trans,
            "image_size": config.data.image_size,
            "sampling": scorer.method.sampling_name(config),
            "sampling_settings": scorer.method.sampling_settings(config),
            **cost,
            "checkpoints": checkpoints,
            "weights": chain.weights,
            "test_set": slices["test"].fingerprint["contents"],
            "trained_steps": {direction: step_of(path.name) for direction, path in chain.checkpoints.items()},
        }
        writer.close(run)
        data = {split: parts.fingerprint for split, parts in slices.items()}
        write_record(new, {**run, "config": config.to_dict(), "data": data, "run": describe_run(scorer.device)})
        score_maps(new, *read_maps(new / ERROR_MAPS), experiments.address(results), **options)
        experiments.remove(f"results/{results.name}", EVENTS)


def rescore(path: Path, options: dict) -> None:
    """Score the error maps of an earlier test run, given its results folder or its error_maps.npz."""
    from evaluation.report import EVENTS, score_maps
    from evaluation.results import ERROR_MAPS, read_maps
    from utils.files import replaced

    path = path / ERROR_MAPS if path.is_dir() else path
    run, maps = read_maps(path)
    with replaced(path.parent, "--rescore", [EVENTS]) as new:
        score_maps(new, run, maps, str(path.parent), **options)


def combine_runs(runs: list[str], options: dict) -> None:
    """Sum the chosen scores of several test runs, and write the results next to those of the first run."""
    from evaluation.combination import INTENSITY, combine
    from evaluation.report import EVENTS, score_maps
    from evaluation.results import ERROR_MAPS, read_maps, write_maps
    from utils.experiment import write_record
    from utils.files import replaced

    name, run, maps = combine(runs)
    results = next(Path(one) for one in runs if one != INTENSITY).parent / name
    with replaced(results, "--combine", [EVENTS]) as new:
        write_record(new, run)
        write_maps(new / ERROR_MAPS, run, maps)
        score_maps(new, *read_maps(new / ERROR_MAPS), str(results), **options)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__)
    select = "checkpoint: the newest EMA weights, or of all saved weights those with the highest validation AUPRC"
    parser.add_argument("--select", default="newest", choices=["newest", "validation"], help=select)
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--compare",
        nargs=2,
        type=local_path,
        metavar=("RUN_A", "RUN_B"),
        help="instead of testing, compare the test runs in two folders slice by slice (paired bootstrap over subjects)",
    )
    combine = "instead of testing, sum the chosen scores of the runs in these folders; intensity: the input itself"
    add("--combine", nargs="+", metavar="RUN", help=combine)
    add("--rescore", type=local_path, metavar="RUN", help="instead of testing, score the error maps of a run again")
    return parse_run_args(parser)


if __name__ == "__main__":
    run(main)
