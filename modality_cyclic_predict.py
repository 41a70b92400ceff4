"""Mark what is anomalous in your own scans: skull-stripped NIfTI volumes of the input modality, without any truth."""

import argparse
import json
import math
import shlex
import sys
import tempfile
from pathlib import Path

from datasets.cohorts import VOLUME_SUFFIXES
from datasets.records import NORMALISATION
from scoring.chain import (
    Chain,
    chain_parser,
    find_chain,
    require_same_preprocessing,
    results_name,
    sampling_name,
)
from utils.cli import UserError, parse_run_args, run
from utils.storage import Folder, local_path, open_folder

PASSED_OVER = ("_anomaly", "_mask")  # ends of names that are no scans, in a folder


def main() -> None:
    args, overrides = parse_args()
    with open_folder(args.logdir) as experiments:
        predict(args, overrides, experiments)


def predict(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Score the scans one after another, and write what came out of each."""
    # Only now what takes seconds to import.
    from guided_diffusion import dist_util
    from scoring.scan import read_scan, score_scan, trained_geometry, write_results
    from scoring.scorer import Scorer
    from utils.device import pick_device

    scans = find_scans(args.scan)
    refuse_to_overwrite(args.output_dir, scans)
    dist_util.setup()
    experiments.writes = False
    chain = find_chain(args, overrides, experiments)
    forward, backward = chain.forward, chain.backward
    require_same_preprocessing(chain)
    geometry = trained_geometry(forward if forward.grid else backward)
    quantiles = forward.normalisation or backward.normalisation or NORMALISATION
    threshold, origin = find_threshold(args, overrides, experiments, chain)
    scorer = Scorer(chain, pick_device(dist_util.gpu_id(args.gpu_id)))
    print(f"forward:   {experiments.address(forward.checkpoint)}")
    print(f"backward:  {experiments.address(backward.checkpoint)}\nthreshold: {threshold:.6g}, {origin}")

    failures = []
    for name, path in scans.items():
        print(f"\n{path}")
        try:
            scan = read_scan(path, geometry, quantiles, args.slices)
        except UserError as error:
            if args.scan.is_file():
                raise
            failures.append(str(error))
            print("left out")
            continue
        for warning in scan.warnings:
            print(f"warning: {warning}")
        make_folder(args.output_dir)
        anomaly = score_scan(scorer, scan)
        if dist_util.rank() == 0:
            write_results(args.output_dir, name, scan, anomaly, threshold, quantiles)
    speaks = dist_util.rank() == 0
    dist_util.shut_down()
    if failures:
        for reason in failures if speaks else []:
            print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
        sys.exit(1)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__, on_slices=False)
    add = parser.add_argument
    add(
        "--scan",
        type=local_path,
        required=True,
        help="a volume of the input modality, .nii or .nii.gz; or a folder: then every volume directly in it, apart "
        "from *_anomaly and *_mask of an earlier run. The skull must have been stripped, the background be 0; where "
        "there is too much that is not 0 for a brain, there is a warning",
    )
    add(
        "--output_dir",
        type=local_path,
        required=True,
        help="where NAME_anomaly.nii.gz, NAME_mask.nii.gz and NAME_report.png go",
    )
    add(
        "--threshold",
        type=positive_number,
        help="score from which on a voxel is marked (default: the validation threshold of the same translators' "
        "test run)",
    )
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

    Raises:
        UserError: nothing is there, nothing that is called a volume, or two of the same name.
    """
    if not path.exists():
        raise UserError(f"--scan {path} is not there")
    if path.is_dir():
        paths = sorted(
            one
            for one in path.iterdir()
            if one.name.endswith(VOLUME_SUFFIXES)
            and not one.name.startswith(".")
            and not scan_name(one).endswith(PASSED_OVER)
        )
    else:
        paths = [path] if path.name.endswith(VOLUME_SUFFIXES) else []
    if not paths:
        raise UserError(f"no NIfTI volume (.nii, .nii.gz) in --scan {path}")
    scans = {}
    for one in paths:
        name = scan_name(one)
        if name in scans:
            raise UserError(
                f"{scans[name]} and {one} have the same name: rename one, their results would mix"
            )
        scans[name] = one
    return scans


def scan_name(path: Path) -> str:
    """What a scan's results are called after."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def refuse_to_overwrite(output_dir: Path, scans: dict[str, Path]) -> None:
    """Spare files that only have the names of results: `NAME_mask.nii.gz` is what others call a brain mask.

    Raises:
        UserError: there is one, or no folder can be there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    for name in scans:
        mask = output_dir / f"{name}_mask.nii.gz"
        if mask.exists() and not (output_dir / f"{name}_anomaly.nii.gz").exists():
            raise UserError(
                f"{mask} is there, and not from an earlier run: name another --output_dir, lest it be overwritten"
            )


def make_folder(output_dir: Path) -> None:
    """Make the folder for results.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # so that it fails now, not after hours of scoring
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to ({error.strerror})") from error


def find_threshold(
    args: argparse.Namespace, overrides: list[str], experiments: Folder, chain: Chain
) -> tuple[float, str]:
    """The threshold, and where it is from: `--threshold`, or what the same translators' test run chose.

    Raises:
        UserError: there is no such test run, it is of other checkpoints, or it had no validation slices.
    """
    if args.threshold is not None:
        return args.threshold, "as --threshold says"
    folder = f"results/{results_name(chain)}"
    experiments.pull(folder, "metrics.json")
    path = experiments.local / folder / "metrics.json"
    remedy = f"run {test_command(args, overrides)} first, or give --threshold"
    if not path.is_file():
        raise UserError(f"no threshold, since there is no {path}: {remedy}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        tested = {
            direction: short(metrics["checkpoints"][direction]) for direction in ("forward", "backward")
        }
        sampling, validation = metrics["sampling"], metrics["validation"]
        threshold = validation and validation["threshold"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    now = {"forward": short(chain.forward.checkpoint), "backward": short(chain.backward.checkpoint)}
    if tested != now or sampling != (sampling_name(chain.config) if args.model_name == "diffusion" else None):
        raise UserError(
            f"the threshold in {path} is of other weights ({tested['forward']} and {tested['backward']}, not "
            f"{now['forward']} and {now['backward']}): {remedy}"
        )
    if not threshold:
        raise UserError(
            f"{path} has no validation threshold, for want of validation slices: preprocess some and {remedy}"
        )
    return threshold, f"the validation threshold in {experiments.address(path)}"


def short(checkpoint: Path | str) -> str:
    """An experiment and its checkpoint, wherever the folder of experiments lies."""
    return "/".join(Path(checkpoint).absolute().parts[-2:])


def test_command(args: argparse.Namespace, overrides: list[str]) -> str:
    """The command that tests the translators of this run."""
    defaults = vars(chain_parser(__doc__).parse_args([]))
    given = {key: getattr(args, key, default) for key, default in defaults.items()}
    flags = [f"--{key}={value}" for key, value in given.items() if value != defaults[key]]
    return shlex.join(["python", "modality_cyclic_test.py", *flags, *overrides])


if __name__ == "__main__":
    run(main)
