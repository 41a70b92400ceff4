"""Segment anomalies in your own scans: skull-stripped NIfTI volumes of the input modality, without ground truth."""

import argparse
import ctypes
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import load_method
from scoring.chain import (
    Chain,
    chain_parser,
    find_chain,
    reload_chain,
    require_same_preprocessing,
    require_tested_weights,
    results_name,
)
from utils.cli import UserError, parse_run_args, run
from utils.files import writing
from utils.storage import Folder, local_path, open_folder

FROZEN_THRESHOLDS = ("validation", "healthy")  # of a test run, in the order in which prediction prefers them


def main() -> None:
    args, overrides = parse_args()
    with open_folder(args.logdir) as experiments:
        predict(args, overrides, experiments)


def predict(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Score the scans one after another, and write their results."""
    # Imported here because these take seconds to load.
    from datasets.records import NORMALISATION
    from guided_diffusion import dist_util
    from scoring.scan import draw_report, read_scan, score_scan, training_geometry, write_results
    from scoring.scorer import Scorer
    from utils.device import pick_device

    scans = find_scans(args.scan)
    references = find_references(args, scans)
    require_safe_output(args.output_dir, scans)
    dist_util.setup()
    experiments.writable = False
    scores, threshold, origin = find_scores(args, overrides, experiments)
    chains = [score.chain for score in scores if score.chain]
    for chain in chains:
        require_same_preprocessing(chain)
    translators = [one for chain in chains for one in chain.translators.values()]
    geometry = training_geometry(next((one for one in translators if one.preprocessing.get("grid")), translators[0]))
    normalisations = (translator.preprocessing.get("normalisation") for translator in translators)
    quantiles = next(filter(None, normalisations), NORMALISATION)
    device = pick_device(dist_util.gpu_id(args.gpu_id), chains[0].config.deterministic)
    scores = [score._replace(scorer=Scorer(score.chain, device)) if score.chain else score for score in scores]
    for chain in chains:
        for direction, checkpoint in chain.checkpoints.items():
            print(f"{direction + ':':10} {experiments.address(checkpoint)}")
    print(f"threshold: {threshold:.6g}, {origin}")
    meaning = "combined" if args.combined else "chosen" if scores[0].chosen else scores[0].scorer.score_kind

    failures = []
    for name, path in scans.items():
        print(f"\n{path}")
        try:
            scan = read_scan(path, geometry, quantiles, args.slices, references.get(name))
        except UserError as error:
            if args.scan.is_file():
                raise
            failures.append(str(error))
            print("skipped")
            continue
        for warning in scan.warnings:
            print(f"warning: {warning}")
        create_output_dir(args.output_dir)
        anomaly = score_scan(scores, scan)
        if dist_util.rank() == 0:
            require_safe_output(args.output_dir, {name: path})  # another run may have written there since
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
    scan = (
        "skull-stripped volume of the input modality with a background of 0 (.nii, .nii.gz), or a folder of such "
        "volumes, of which *_anomaly and *_mask are ignored"
    )
    add("--scan", type=local_path, required=True, help=scan)
    scan_trans = "for --score one_way: the same head in the target modality, or a folder of volumes with the same names"
    add("--scan_trans", type=local_path, help=scan_trans)
    results = "folder for NAME_anomaly.nii.gz, NAME_mask.nii.gz and NAME_report.png"
    add("--output_dir", type=local_path, required=True, help=results)
    scoring = "score chosen on validation slices, or the published one (default: chosen, if the test run has it)"
    add("--scoring", choices=["chosen", "published"], help=scoring)
    combined = "score with the runs of this folder, from modality_cyclic_test.py --combine, whatever other flags select"
    add("--combined", type=local_path, metavar="RUN", help=combined)
    threshold = (
        "mark voxels with at least this score: a number, or a threshold of the translators' test run, chosen on its "
        "validation slices for the highest Dice or for few marks in healthy tissue (default: validation, else healthy)"
    )
    add("--threshold", type=threshold_or_name, metavar="{validation,healthy,NUMBER}", help=threshold)
    slices = "range of the scan's own axial slices to score, counted from 0, STOP excluded (default: all)"
    add("--slices", type=int, nargs=2, metavar=("START", "STOP"), help=slices)
    args, overrides = parse_run_args(parser)
    if args.slices and not 0 <= args.slices[0] < args.slices[1]:
        parser.error(f"--slices must satisfy 0 <= START < STOP, not {args.slices[0]} and {args.slices[1]}")
    return args, overrides


def threshold_or_name(text: str) -> float | str:
    """Parse the name of a threshold, or a number that is finite and above 0 in single precision."""
    if text in FROZEN_THRESHOLDS:
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < ctypes.c_float(number).value < math.inf:  # scores have single precision
        names = ", ".join(FROZEN_THRESHOLDS)
        raise argparse.ArgumentTypeError(f"{text!r} is not {names} or a finite number above 0 in single precision")
    return number


def find_scans(path: Path) -> dict[str, Path]:
    """Return the volumes that `--scan` selects, by file name without suffix.

    Raises:
        UserError: if the path does not exist, contains no volume, or contains two of the same name.
    """
    from datasets.cohorts import VOLUME_SUFFIXES

    if not path.exists():
        raise UserError(f"--scan {path} does not exist")
    scans: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        name = file.name.removesuffix(".gz").removesuffix(".nii")
        ignored = path.is_dir() and (name.endswith(("_anomaly", "_mask")) or name.startswith("."))
        if ignored or not file.name.endswith(VOLUME_SUFFIXES):
            continue
        if name in scans:
            raise UserError(f"{scans[name]} and {file} have the same name: rename one, or their results would collide")
        scans[name] = file
        if not file.is_file():  # reading a pipe or a device might block forever
            raise UserError(f"{file} is not a regular file: give --scan a volume or a folder of volumes")
    if not scans:
        raise UserError(f"no NIfTI volume (.nii, .nii.gz) in --scan {path}")
    return scans


def find_references(args: argparse.Namespace, scans: Mapping[str, Path]) -> dict[str, Path]:
    """Return the volumes of the target modality for a one-way score, by the names of their scans.

    Raises:
        UserError: if `--scan_trans` is missing or superfluous, or a volume does not exist or is the scan itself.
    """
    from utils.nifti import find_copies

    if (args.scan_trans is None) != (args.score == "cycle"):
        raise UserError("--score one_way and --scan_trans go together: the score compares the translation with it")
    if args.scan_trans is None:
        return {}
    in_folder = args.scan.is_dir()
    references = {name: args.scan_trans / path.name if in_folder else args.scan_trans for name, path in scans.items()}
    for name, path in references.items():
        if not path.is_file():
            raise UserError(f"no volume at {path}: check --scan_trans")
        if find_copies((scans[name], path)):
            raise UserError(f"--scan_trans {path} is the same scan as {scans[name]}: name the other modality")
    return references


def require_safe_output(output_dir: Path, scans: Mapping[str, Path]) -> None:
    """Check that a scan's results replace only earlier ones of the same scan.

    Other folders may hold scans of the same name, and NAME_mask.nii.gz is a common name for brain masks.

    Raises:
        UserError: if another file would be overwritten, or `output_dir` is not a folder.
    """
    from scoring.scan import RESULT_SUFFIXES, is_result

    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    for name, scan in scans.items():
        paths = [output_dir / (name + suffix) for suffix in RESULT_SUFFIXES]
        for path, volume in zip(paths, (*paths[:2], paths[0]), strict=True):  # the report has no header
            if path.exists() and not is_result(volume, scan):
                remedy = "move it away or name another --output_dir"
                raise UserError(f"{path} is not marked as a result of {scan} and would be overwritten: {remedy}")


def create_output_dir(output_dir: Path) -> None:
    """Create the results folder, or raise a UserError if it cannot be created or written to."""
    with writing(output_dir, "--output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # fail now rather than after hours of scoring


def find_scores(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> tuple[list[Any], float, str]:
    """Return the scores to sum, a list of `ScanScore`, the threshold, and a description of the threshold's origin.

    Raises:
        UserError: if the test run does not exist, used other checkpoints or sampling settings, or has no threshold.
    """
    if args.combined is None:
        return find_chain_score(args, overrides, experiments, find_chain(args, overrides, experiments))
    from evaluation.results import chosen_score, read_metrics
    from evaluation.tables import describe_members
    from scoring.scan import ScanScore

    metrics = read_metrics(args.combined)
    if "members" not in metrics:
        raise UserError(f"{args.combined} is not a combined run: leave out --combined and select translators by flags")
    if not any(one["checkpoints"] for one in metrics["members"]):
        raise UserError(f"{args.combined} records no networks: combine its runs again")
    if args.scoring == "published":
        raise UserError("a combined run sums chosen scores: leave out --scoring published")
    scores = [
        ScanScore(reload_chain(one, experiments) if one["checkpoints"] else None, 0.0, chosen_score(one), one["weight"])
        for one in metrics["members"]
    ]
    threshold, origin = read_threshold(args, metrics, args.combined, "combine runs that were tested on them")
    print(f"score: {describe_members(metrics['members'])}")
    return scores, threshold, origin


def find_chain_score(
    args: argparse.Namespace, overrides: list[str], experiments: Folder, chain: Chain
) -> tuple[list[Any], float, str]:
    """Return the same as `find_scores` for a single chain: its test run's chosen score, or the published one.

    No test run is needed for a published score without constants if `--threshold` is given.
    """
    from evaluation.results import METRICS, chosen_score, read_metrics
    from evaluation.tables import describe_score
    from scoring.scan import ScanScore

    method = load_method(args.model_name)
    standardised = method.score_kind(chain.config) == "standardised"
    folder = f"results/{results_name(chain)}"
    has_number = isinstance(args.threshold, float)
    if has_number and not standardised and args.scoring == "published":
        return [ScanScore(chain, 0.0, None)], args.threshold, "from --threshold"
    experiments.pull(folder, METRICS)
    path = experiments.local / folder / METRICS
    needs_constants = standardised or args.scoring != "published"
    results = "its score and threshold" if needs_constants else "a threshold"
    test = f"run {test_command(args, overrides)} to find {results}"
    remedy = test if needs_constants else f"{test}, or give --threshold"
    if has_number and not standardised:
        remedy = f"{test}, or give --scoring published"
    metrics = read_metrics(path.parent, remedy)
    tested, current = (
        {direction: checkpoint_name(one) for direction, one in checkpoints.items()}
        for checkpoints in (metrics["checkpoints"], chain.checkpoints)
    )
    if tested != current:
        difference = f"{' and '.join(tested.values())}, not {' and '.join(current.values())}"
        raise UserError(f"{path} was computed with other weights ({difference}): {remedy}")
    require_tested_weights(chain, metrics, path, remedy)
    if metrics.get("sampling_settings") != method.sampling_settings(chain.config):
        raise UserError(f"{path} was computed with other sampling settings: {remedy}")
    block, chosen = metrics.get("chosen"), None
    if args.scoring == "chosen" and not block:
        raise UserError(f"{path} has no chosen score: score it again with --rescore {path.parent}")
    description = "published"
    if block and args.scoring != "published":
        chosen, description = chosen_score(block), f"chosen on validation slices, {describe_score(block['settings'])}"
    threshold, origin = read_threshold(args, block if chosen else metrics, experiments.address(path), test)
    print(f"score: {description}")
    return [ScanScore(chain, metrics["usual_error"], chosen)], threshold, origin


def read_threshold(args: argparse.Namespace, block: Mapping[str, Any], source: Any, remedy: str) -> tuple[float, str]:
    """Return the threshold given by the user or found in a block of metrics.json, and a description of its origin.

    Raises:
        UserError: if there is neither.
    """
    if isinstance(args.threshold, float):
        return args.threshold, "from --threshold"
    names = [args.threshold] if args.threshold else FROZEN_THRESHOLDS
    found = {name: block[name]["threshold"] for name in names if block.get(name) and block[name]["threshold"]}
    if not found:
        data = "validation slices with lesions" if args.threshold == "validation" else "validation slices"
        remedy = f"preprocess {data} and {remedy}, or give --threshold"
        raise UserError(f"{source} has no {' or '.join(names)} threshold: {remedy}")
    name, threshold = next(iter(found.items()))
    if name == "healthy":
        share = 100 * block[name].get("share", math.nan)
        return threshold, f"the healthy threshold in {source} (marked {share:g} % of healthy validation pixels)"
    return threshold, f"the validation threshold in {source}"


def checkpoint_name(checkpoint: Path | str) -> str:
    """Return `experiment/file`, which is the same in every copy of the experiments."""
    return "/".join(Path(checkpoint).absolute().parts[-2:])


def test_command(args: argparse.Namespace, overrides: list[str]) -> str:
    """Return the command that tests this run's translators."""
    defaults, given = vars(chain_parser(__doc__).parse_args([])), vars(args)
    flags = [f"--{key}={given[key]}" for key in defaults if given.get(key, defaults[key]) != defaults[key]]
    return shlex.join(["python", "modality_cyclic_test.py", *flags, *overrides])


if __name__ == "__main__":
    run(main)
