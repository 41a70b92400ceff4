"""Mark what is anomalous in your own scans: skull-stripped NIfTI volumes of the input modality, without any truth."""

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets.cohorts import VOLUME_SUFFIXES
from datasets.records import NORMALISATION
from models import load_method
from scoring.chain import (
    Chain,
    chain_of_run,
    chain_parser,
    find_chain,
    require_same_preprocessing,
    results_name,
)
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
    parts, threshold, origin = find_parts(args, overrides, experiments)
    chains = [part.chain for part in parts if part.chain]
    for chain in chains:
        require_same_preprocessing(chain)
    translators = [one for chain in chains for one in chain.translators.values()]
    geometry = trained_geometry(next((one for one in translators if one.preprocessing.get("grid")), translators[0]))
    normalisations = (translator.preprocessing.get("normalisation") for translator in translators)
    quantiles = next(filter(None, normalisations), NORMALISATION)
    device = pick_device(dist_util.gpu_id(args.gpu_id), chains[0].config.deterministic)
    parts = [part._replace(scorer=Scorer(part.chain, device)) if part.chain else part for part in parts]
    for chain in chains:
        for direction, checkpoint in chain.checkpoints.items():
            print(f"{direction + ':':10} {experiments.address(checkpoint)}")
    print(f"threshold: {threshold:.6g}, {origin}")
    meaning = "combined" if args.combined else "chosen" if parts[0].chosen else parts[0].scorer.score_kind

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
        anomaly = score_scan(parts, scan)
        if dist_util.rank() == 0:
            report = draw_report(scan, anomaly, threshold, meaning)
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
    scoring = (
        "the score that the test run chose on its validation slices, or the published one (default: chosen, where the "
        "test run has it)"
    )
    add("--scoring", choices=["chosen", "published"], help=scoring)
    combined = "results folder of modality_cyclic_test.py --combine: its runs instead of those that other flags name"
    add("--combined", type=local_path, metavar="RUN", help=combined)
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


def find_parts(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> tuple[list[Any], float, str]:
    """The scores, `ScanScore`, whose weighted sum scores a scan; the threshold; and where that is from, a test run.

    Raises:
        UserError: if there is no such run, it is of other checkpoints or another sampling, or it has no threshold.
    """
    if args.combined is None:
        return find_score(args, overrides, experiments, find_chain(args, overrides, experiments))
    from evaluation.results import chosen_score, read_metrics
    from evaluation.tables import members_words
    from scoring.scan import ScanScore

    metrics = read_metrics(args.combined)
    if "members" not in metrics:
        raise UserError(f"{args.combined} is no combined run: leave out --combined, and name its translators")
    if not any(one["checkpoints"] for one in metrics["members"]):
        raise UserError(f"{args.combined} names no networks: combine its runs again")
    if args.scoring == "published":
        raise UserError("a combined run sums chosen scores: leave out --scoring published")
    parts = [
        ScanScore(chain_of_run(one, experiments) if one["checkpoints"] else None, 0.0, chosen_score(one), one["weight"])
        for one in metrics["members"]
    ]
    threshold, origin = threshold_of(args, metrics, args.combined, "combine runs with validation slices")
    print(f"score: {members_words(metrics['members'])}")
    return parts, threshold, origin


def find_score(
    args: argparse.Namespace, overrides: list[str], experiments: Folder, chain: Chain
) -> tuple[list[Any], float, str]:
    """The score of a chain that its test run chose, or the published one, and the threshold, as from `find_parts`.

    With `--threshold`, a published score that takes no constant needs no test run.
    """
    method = load_method(args.model_name)
    standardised = method.score_kind(chain.config) == "standardised"
    from evaluation.results import METRICS, chosen_score, read_metrics
    from evaluation.tables import score_words
    from scoring.scan import ScanScore

    folder = f"results/{results_name(chain)}"
    if args.threshold is not None and not standardised and args.scoring == "published":
        return [ScanScore(chain, 0.0, None)], args.threshold, "as --threshold says"
    experiments.pull(folder, METRICS)
    path = experiments.local / folder / METRICS
    needs_constants = standardised or args.scoring != "published"
    found_there = "its score and threshold" if needs_constants else "a threshold"
    test = f"run {test_command(args, overrides)} to find {found_there}"
    remedy = test if needs_constants else f"{test}, or give --threshold"
    if args.threshold is not None and not standardised:
        remedy = f"{test}, or give --scoring published"
    metrics = read_metrics(path.parent, remedy)
    tested, now = (
        {direction: short(where) for direction, where in checkpoints.items()}
        for checkpoints in (metrics["checkpoints"], chain.checkpoints)
    )
    if tested != now:
        others = f"of other weights ({' and '.join(tested.values())}, not {' and '.join(now.values())})"
        raise UserError(f"the threshold in {path} is {others}: {remedy}")
    if metrics.get("sampling_settings") != method.sampling_settings(chain.config):
        raise UserError(f"the threshold in {path} is of another sampling: {remedy}")
    block, chosen = metrics.get("chosen"), None
    if args.scoring == "chosen" and not block:
        raise UserError(f"{path} has no chosen score: score it again with --rescore {path.parent}")
    words = "the published one"
    if block and args.scoring != "published":
        chosen, words = chosen_score(block), f"chosen on validation slices, {score_words(block['settings'])}"
    threshold, origin = threshold_of(args, block if chosen else metrics, experiments.address(path), test)
    print(f"score: {words}")
    return [ScanScore(chain, metrics["usual_error"], chosen)], threshold, origin


def threshold_of(args: argparse.Namespace, block: Mapping[str, Any], where: Any, remedy: str) -> tuple[float, str]:
    """`--threshold`, or the validation threshold of a block of metrics.json; a UserError if there is neither."""
    if args.threshold is not None:
        return args.threshold, "as --threshold says"
    threshold = block["validation"] and block["validation"]["threshold"]
    if not threshold:
        raise UserError(
            f"{where} has no validation threshold: preprocess validation slices with lesions and {remedy}, or give "
            "--threshold"
        )
    return threshold, f"the validation threshold in {where}"


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
