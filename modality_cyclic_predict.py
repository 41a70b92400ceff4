"""Mark what is anomalous in your own scans: skull-stripped NIfTI volumes of the input modality, without any truth."""

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets.cohorts import VOLUME_SUFFIXES
from datasets.records import NORMALISATION
from scoring.chain import Chain, chain_parser, find_chain, require_same_preprocessing, results_name, sampling_settings
from utils.cli import UserError, parse_run_args, run
from utils.files import writing
from utils.storage import Folder, local_path, open_folder


def main() -> None:
    args, overrides = parse_args()
    with open_folder(args.logdir) as experiments:
        predict(args, overrides, experiments)


def predict(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Score the scans one after another, and write what came out of each."""
    # Only now what takes seconds to import.
    from guided_diffusion import dist_util
    from scoring.scan import draw_report, read_scan, score_scan, trained_geometry, write_results
    from scoring.scorer import Scorer
    from utils.device import pick_device

    scans = find_scans(args.scan)
    others = find_others(args, scans)
    refuse_to_overwrite(args.output_dir, scans)
    dist_util.setup()
    experiments.writes = False
    chain = find_chain(args, overrides, experiments)
    require_same_preprocessing(chain)
    translators = chain.translators.values()
    geometry = trained_geometry(next((one for one in translators if one.preprocessing.get("grid")), chain.forward))
    normalisations = (translator.preprocessing.get("normalisation") for translator in translators)
    quantiles = next(filter(None, normalisations), NORMALISATION)
    threshold, usual_error, origin = find_threshold(args, overrides, experiments, chain)
    scorer = Scorer(chain, pick_device(dist_util.gpu_id(args.gpu_id), chain.config.deterministic))
    for direction, checkpoint in chain.checkpoints.items():
        print(f"{direction + ':':10} {experiments.address(checkpoint)}")
    print(f"threshold: {threshold:.6g}, {origin}")

    failures = []
    for name, path in scans.items():
        print(f"\n{path}")
        try:
            scan = read_scan(path, geometry, quantiles, args.slices, others.get(name))
        except UserError as error:
            if args.scan.is_file():
                raise
            failures.append(str(error))
            print("left out")
            continue
        for warning in scan.warnings:
            print(f"warning: {warning}")
        make_folder(args.output_dir)
        anomaly = score_scan(scorer, scan, usual_error)
        if dist_util.rank() == 0:
            report = draw_report(scan, anomaly, threshold, scorer.score_kind)
            write_results(args.output_dir / name, scan, anomaly, threshold, report)
    is_first = dist_util.rank() == 0
    dist_util.shut_down()
    if failures:
        for reason in failures if is_first else []:
            print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
        sys.exit(1)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__, on_slices=False)
    add = parser.add_argument
    add(
        "--scan",
        type=local_path,
        required=True,
        help="a volume of the input modality, .nii or .nii.gz; or a folder, for every volume directly in it except "
        "*_anomaly and *_mask. Skull-stripped, with a background of 0",
    )
    other = "for --score one_way: the same in the modality that is translated to; files of a folder by the same names"
    add("--scan_trans", type=local_path, help=other)
    results = "NAME_anomaly.nii.gz, NAME_mask.nii.gz and NAME_report.png"
    add("--output_dir", type=local_path, required=True, help=f"where {results} go")
    default = "the validation threshold of the same translators' test run"
    add("--threshold", type=positive_number, help=f"score from which on a voxel is marked (default: {default})")
    add(
        "--slices",
        type=int,
        nargs=2,
        metavar=("START", "STOP"),
        help="range of the scan's own axial slices, counted from 0, START included and STOP not (default: all)",
    )
    args, overrides = parse_run_args(parser)
    if args.slices and not 0 <= args.slices[0] < args.slices[1]:
        parser.error(f"--slices must obey 0 <= START < STOP, not {args.slices[0]} and {args.slices[1]}")
    return args, overrides


def positive_number(text: str) -> float:
    """A finite number above 0, as an argument gives it."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def find_scans(path: Path) -> dict[str, Path]:
    """The scans that `--scan` names, by their names without suffix.

    A UserError if nothing is there, nothing that is called a volume, or two of the same name.
    """
    if not path.exists():
        raise UserError(f"--scan {path} is not there")
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    scans: dict[str, Path] = {}
    for one in paths:
        name = one.name.removesuffix(".gz").removesuffix(".nii")
        of_results = path.is_dir() and (name.endswith(("_anomaly", "_mask")) or name.startswith("."))
        if not one.name.endswith(VOLUME_SUFFIXES) or of_results:
            continue
        if name in scans:
            raise UserError(f"{scans[name]} and {one} have the same name: rename one, their results would mix")
        scans[name] = one
        if not one.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{one} is no file: name a volume, or a folder of volumes, with --scan")
    if not scans:
        raise UserError(f"no NIfTI volume (.nii, .nii.gz) in --scan {path}")
    return scans


def find_others(args: argparse.Namespace, scans: Mapping[str, Path]) -> dict[str, Path]:
    """The volumes of the other modality that the one-way score needs, by the names of their scans.

    A UserError if they are not there, or not needed.
    """
    if (args.scan_trans is None) != (args.score == "cycle"):
        raise UserError("--score one_way and --scan_trans go together: the translation is compared with that scan")
    if args.scan_trans is None:
        return {}
    in_folder = args.scan.is_dir()
    others = {name: args.scan_trans / path.name if in_folder else args.scan_trans for name, path in scans.items()}
    for path in others.values():
        if not path.is_file():
            raise UserError(f"no volume {path}: check --scan_trans")
    return others


def refuse_to_overwrite(output_dir: Path, scans: Iterable[str]) -> None:
    """Spare files that only have the names of results: `NAME_mask.nii.gz` is what others call a brain mask.

    A UserError if there is one, or no folder can be there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    for name in scans:
        mask = output_dir / f"{name}_mask.nii.gz"
        if mask.exists() and not (output_dir / f"{name}_anomaly.nii.gz").exists():
            raise UserError(f"{mask} is not from an earlier run and would be overwritten: name another --output_dir")


def make_folder(output_dir: Path) -> None:
    """Make the folder for results; a UserError if it cannot be made or written to."""
    with writing(output_dir, "--output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # so that it fails now, not after hours of scoring


def find_threshold(
    args: argparse.Namespace, overrides: list[str], experiments: Folder, chain: Chain
) -> tuple[float, float, str]:
    """The threshold, the usual error of the standardised score, and where they are from: the translators' test run.

    `--threshold` replaces the first, and with other scores needs no test run. A UserError if there is no such run, it
    is of other checkpoints or another sampling, or it had no validation slices.
    """
    standardised = args.model_name == "diffusion" and chain.config.score_model.sampling.score == "standardised"
    if args.threshold is not None and not standardised:
        return args.threshold, 0.0, "as --threshold says"
    from evaluation.results import METRICS, read_metrics

    folder = f"results/{results_name(chain)}"
    experiments.pull(folder, METRICS)
    path = experiments.local / folder / METRICS
    test = f"run {test_command(args, overrides)} to find a threshold"
    remedy = f"{test} and what an error is usual" if standardised else f"{test}, or give --threshold"
    metrics = read_metrics(path.parent, remedy)
    tested, now = (
        {direction: short(where) for direction, where in checkpoints.items()}
        for checkpoints in (metrics["checkpoints"], chain.checkpoints)
    )
    if tested != now:
        others = f"of other weights ({' and '.join(tested.values())}, not {' and '.join(now.values())})"
        raise UserError(f"the threshold in {path} is {others}: {remedy}")
    if metrics.get("sampling_settings") != sampling_settings(chain):
        raise UserError(f"the threshold in {path} is of another sampling: {remedy}")
    usual_error = metrics["usual_error"]
    if args.threshold is not None:
        return args.threshold, usual_error, "as --threshold says"
    threshold = metrics["validation"] and metrics["validation"]["threshold"]
    if not threshold:
        raise UserError(
            f"{path} has no validation threshold: preprocess validation slices and {test}, or give --threshold"
        )
    return threshold, usual_error, f"the validation threshold in {experiments.address(path)}"


def short(checkpoint: Path | str) -> str:
    """An experiment and its checkpoint, wherever the folder of experiments lies."""
    return "/".join(Path(checkpoint).absolute().parts[-2:])


def test_command(args: argparse.Namespace, overrides: list[str]) -> str:
    """The command that tests the translators of this run."""
    defaults, given = vars(chain_parser(__doc__).parse_args([])), vars(args)
    flags = [f"--{key}={given[key]}" for key in defaults if given.get(key, defaults[key]) != defaults[key]]
    return shlex.join(["python", "modality_cyclic_test.py", *flags, *overrides])


if __name__ == "__main__":
    run(main)
