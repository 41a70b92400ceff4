"""Mark what is anomalous in your own scans: skull-stripped NIfTI volumes of the input modality, without any truth."""

import argparse
import json
import math
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datasets.cohorts import VOLUME_SUFFIXES
from modality_cyclic_test import (
    Scorer,
    Translator,
    announce,
    chain_parser,
    find_translators,
    join_processes,
    progress_bar,
    require_same_preprocessing,
    results_name,
    sampling_name,
)
from utils.cli import ArgumentParser, UserError, parse_run_args, run
from utils.storage import Folder, local_path, open_folder

if TYPE_CHECKING:  # these take seconds to import
    import numpy as np
    from matplotlib.figure import Figure

    from datasets.grid import Field, TrainingGrid

RESULTS = ("_anomaly.nii.gz", "_mask.nii.gz", "_report.png")  # what is written of each scan
PASSED_OVER = ("_anomaly", "_mask")  # ends of names that are no scans, in a folder
# Where training has no record: the defaults of preprocessing.
NORMALISATION = {"percentage_lower": 0.02, "percentage_upper": 0.9}
# Litres: adults have 1 to 1.9, a head with its skull 3 and more, a field full of noisy air 8.
LARGEST_BRAIN = 2.2
SHOWN = 6  # slices in a report
APART = 6.0  # mm, at least, between two of them


class Scan(NamedTuple):
    """A scan, and what the networks are to see of it."""

    path: Path
    volume: "np.ndarray"  # [I, J, K] as in the file
    affine: "np.ndarray"
    chosen: "np.ndarray"  # bool [I, J, K]: the brain of the slices asked for
    field: "Field"  # where it lies on the grid of the training data
    image: "np.ndarray"  # float32 [H, W, D] there, normalised
    brain: "np.ndarray"  # bool [H, W, D]
    numbers: "np.ndarray"  # which of the D slices are to be scored
    warnings: list[str]


def main() -> None:
    args, overrides = parse_args()
    with open_folder(args.logdir) as experiments:
        predict(args, overrides, experiments)


def predict(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Score the scans one after another, and write what came out of each."""
    # Only now what takes seconds to import.
    from guided_diffusion import dist_util
    from utils.device import pick_device

    scans = find_scans(args.scan)
    refuse_to_overwrite(args.output_dir, scans)
    join_processes()
    experiments.writes = False
    forward, backward = find_translators(args, overrides, experiments)
    require_same_preprocessing(forward, backward)
    grid = grid_of(forward if forward.grid else backward)
    quantiles = forward.normalisation or backward.normalisation or NORMALISATION
    threshold, origin = find_threshold(args, overrides, experiments, forward, backward)
    scorer = Scorer(args.model_name, forward, backward, pick_device(dist_util.gpu_id(args.gpu_id)))
    print(f"forward:   {experiments.address(forward.checkpoint)}")
    print(f"backward:  {experiments.address(backward.checkpoint)}\nthreshold: {threshold:.6g}, {origin}")

    failures = []
    for name, path in scans.items():
        print(f"\n{path}")
        try:
            scan = read_scan(path, grid, quantiles, args.slices)
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


# ----------------------------------------------------------------------------------------------------------
# Command line


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = own_flags(chain_parser(__doc__, on_slices=False))
    args, overrides = parse_run_args(parser)
    if args.slices and not 0 <= args.slices[0] < args.slices[1]:
        parser.error(f"--slices must obey 0 <= START < STOP, not {args.slices[0]} and {args.slices[1]}")
    return args, overrides


def own_flags(parser: ArgumentParser) -> ArgumentParser:
    """The parser with the flags that the test script does not have."""
    add = parser.add_argument
    add(
        "--scan",
        type=local_path,
        required=True,
        help="a volume of the input modality, .nii or .nii.gz; or a folder: then every volume directly in it, apart "
        "from *_anomaly and *_mask of an earlier run. The skull must have been stripped, the background be 0; where "
        f"more than {LARGEST_BRAIN} litres are not 0, there is a warning",
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
    return parser


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
        anomaly, mask, _ = (output_dir / f"{name}{result}" for result in RESULTS)
        if mask.exists() and not anomaly.exists():
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


# ----------------------------------------------------------------------------------------------------------
# What training and testing have left


def grid_of(translator: Translator) -> "TrainingGrid":
    """The grid that a translator was trained on; BraTS's where there is no record of it.

    Raises:
        UserError: the record is damaged.
    """
    from datasets.grid import TrainingGrid

    if not translator.grid:
        return TrainingGrid()
    try:
        return TrainingGrid.from_json(translator.grid)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{translator.checkpoint.parent / 'config.json'} is not what training writes: restore it"
        ) from error


def find_threshold(
    args: argparse.Namespace,
    overrides: list[str],
    experiments: Folder,
    forward: Translator,
    backward: Translator,
) -> tuple[float, str]:
    """The threshold, and where it is from: `--threshold`, or what the same translators' test run chose.

    Raises:
        UserError: there is no such test run, it is of other checkpoints, or it had no validation slices.
    """
    if args.threshold is not None:
        return args.threshold, "as --threshold says"
    folder = f"results/{results_name(args.model_name, forward, backward)}"
    experiments.pull(folder, "metrics.json")
    path = experiments.local / folder / "metrics.json"
    remedy = f"run {test_command(args, overrides)} first, or give --threshold"
    if not path.is_file():
        raise UserError(f"no threshold, since there is no {path}: {remedy}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        tested = {process: short(metrics["checkpoints"][process]) for process in ("forward", "backward")}
        sampling, validation = metrics["sampling"], metrics["validation"]
        threshold = validation and validation["threshold"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    now = {"forward": short(forward.checkpoint), "backward": short(backward.checkpoint)}
    if tested != now or sampling != (
        sampling_name(forward.config) if args.model_name == "diffusion" else None
    ):
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


# ----------------------------------------------------------------------------------------------------------
# From the scan to the slices that the networks know, and back


def read_scan(
    path: Path, grid: "TrainingGrid", quantiles: dict[str, float], slices: tuple[int, int] | None
) -> Scan:
    """Read a scan, put it on the grid of the training data, and normalise it as these were.

    Args:
        path: of the volume.
        grid: of the training data.
        quantiles: `percentage_lower` and `percentage_upper`, as preprocessing has them.
        slices: the scan's own axial slices [start, stop) that are asked for; None: all.

    Raises:
        UserError: it cannot be read or normalised, has not so many slices, or no brain in them.
    """
    import nibabel
    import numpy as np

    from datasets.brats_preprocess import normalise
    from datasets.grid import find_field, move, move_scan
    from datasets.volumes import read_header, read_volume

    volume, where = read_volume(path)
    brain = volume != 0
    try:
        if not np.isfinite(volume).all():
            raise ValueError("some voxels are not finite")
        field, cut_off = find_field(grid, brain, where.affine)
        on_field = move_scan(volume, where.affine, field)
        image = normalise(on_field, quantiles["percentage_lower"], quantiles["percentage_upper"])
    except ValueError as error:
        raise UserError(f"{path} cannot be scored, {error}") from error

    chosen = brain
    if slices:
        axis = axial_axis(where.affine)
        if slices[1] > where.shape[axis]:
            raise UserError(
                f"--slices {slices[0]} {slices[1]} exceeds {path}, which has {where.shape[axis]} axial slices"
            )
        index = tuple(slice(*slices) if i == axis else slice(None) for i in range(3))
        chosen = np.zeros_like(brain)
        chosen[index] = brain[index]
        if not chosen.any():
            raise UserError(f"{path} has no brain in --slices {slices[0]} {slices[1]}")
    # All slices that the way back interpolates between.
    wanted = move(chosen.astype(np.float32), where.affine, field) > 0
    numbers = np.flatnonzero((wanted & (on_field != 0)).any(axis=(0, 1)))

    warnings = []
    litres = np.count_nonzero(brain) * abs(np.linalg.det(where.affine[:3, :3])) / 1e6
    if litres > LARGEST_BRAIN:
        warnings.append(
            f"{litres:.1f} litres of it are not 0, and no brain is larger than {LARGEST_BRAIN}: it does not look "
            "skull-stripped, or its background is not 0; the networks have never seen the like"
        )
    if cut_off > 0.001:
        warnings.append(
            f"{100 * cut_off:.1f} % of its brain lie outside the {field.shape[0]} × {field.shape[1]} px that the "
            "networks see, and are not judged"
        )
    header = read_header(path)
    if header["sform_code"] == header["qform_code"] == 0:
        directions = ", ".join(nibabel.aff2axcodes(where.affine))
        warnings.append(f"its header does not say how it lies: its axes are taken to lead to {directions}")
    return Scan(path, volume, where.affine, chosen, field, image, on_field != 0, numbers, warnings)


def axial_axis(affine: "np.ndarray") -> int:
    """Which axis of a volume leads from feet to head, or back."""
    from nibabel.orientations import io_orientation

    return io_orientation(affine)[:, 0].tolist().index(2)


def score_scan(scorer: Scorer, scan: Scan) -> "np.ndarray":
    """The anomaly score of every voxel of a scan, float32 [I, J, K]; 0 outside its eroded brain."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from datasets.brats2021 import resize_image, resize_mask
    from datasets.grid import Field, move
    from utils.metrics import scored_region

    size = scorer.config.data.image_size
    images, brains = (
        torch.from_numpy(np.moveaxis(stack[:, :, scan.numbers], 2, 0)[:, None].copy())
        for stack in (scan.image, scan.brain.view(np.uint8))
    )
    images = torch.stack([resize_image(image, size) for image in images])
    brains = torch.stack([resize_mask(brain, size) for brain in brains])

    taken = [scorer.samples(brains)]
    announce(scorer, taken)
    with progress_bar(scorer, taken) as bar:
        scores = scorer.score(images, brains, bar.update).score

    scores = scores.where(torch.from_numpy(scored_region(brains[:, 0].numpy()))[:, None], 0)
    scores = F.interpolate(scores, scan.field.shape[:2], mode="bilinear", antialias=True)
    on_field = np.zeros(scan.field.shape, dtype=np.float32)
    on_field[:, :, scan.numbers] = np.moveaxis(scores[:, 0].numpy(), 0, 2)
    anomaly = move(on_field, scan.field.affine, Field(scan.volume.shape, scan.affine))
    return np.where(scan.chosen, anomaly, np.float32(0))


# ----------------------------------------------------------------------------------------------------------
# Results


def write_results(
    output_dir: Path,
    name: str,
    scan: Scan,
    anomaly: "np.ndarray",
    threshold: float,
    quantiles: dict[str, float],
) -> None:
    """Write the score, the mask and the report of a scan, and say in a line what is in them.

    Raises:
        UserError: the folder cannot be written to.
    """
    import numpy as np

    from datasets.volumes import read_header, write_like

    mask = (anomaly >= threshold).astype(np.uint8)
    paths = [output_dir / f"{name}{result}" for result in RESULTS]
    figure = draw_report(scan, anomaly, mask, threshold, quantiles)
    try:
        header = read_header(scan.path)
        for path, voxels in zip(paths, (anomaly, mask), strict=False):
            write_like(header, voxels, scan.affine, path)
        figure.savefig(paths[-1], dpi=110)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to ({error.strerror})") from error
    millilitres = np.count_nonzero(mask) * abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    print(f"{millilitres:.1f} ml at or above the threshold, highest score {anomaly.max():.3g}: {paths[-1]}")


def draw_report(
    scan: Scan, anomaly: "np.ndarray", mask: "np.ndarray", threshold: float, quantiles: dict[str, float]
) -> "Figure":
    """The scan's most anomalous axial slices, as radiologists look at them, numbered as in its file."""
    import numpy as np
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    from datasets.brats_preprocess import normalise
    from utils.figures import scan_figure

    image = normalise(scan.volume, quantiles["percentage_lower"], quantiles["percentage_upper"])
    turn = ornt_transform(io_orientation(scan.affine), axcodes2ornt("LPS"))
    sizes = voxel_sizes(scan.affine)[np.argsort(turn[:, 0])]  # mm along the turned axes
    image, anomaly, mask = (
        np.moveaxis(apply_orientation(volume, turn), 2, 0) for volume in (image, anomaly, mask)
    )
    picked = pick_slices(mask.sum(axis=(1, 2)), anomaly.sum(axis=(1, 2)), round(APART / sizes[2]))
    upside_down = turn[axial_axis(scan.affine), 1] < 0
    labels = [
        f"slice {len(image) - 1 - i if upside_down else i}\n"
        f"{mask[i].sum() * sizes[0] * sizes[1] / 100:.1f} cm² marked, score ≤ {anomaly[i].max():.3g}"
        for i in picked
    ]
    return scan_figure(
        image[picked],
        anomaly[picked],
        mask[picked] > 0,
        labels,
        threshold=threshold,
        aspect=sizes[1] / sizes[0],
        title=f"{scan.path.name}: the slices with the most marked, most first (R: the patient's right)",
    )


def pick_slices(marked: "np.ndarray", scores: "np.ndarray", apart: int) -> list[int]:
    """The slices with the most marked voxels [N], or else the highest sum of scores [N], most first.

    At most SHOWN of them, none without any score, and no two fewer than `apart` slices apart.
    """
    import numpy as np

    picked: list[int] = []
    for i in np.lexsort((scores, marked))[::-1].tolist():
        if len(picked) < SHOWN and scores[i] > 0 and all(abs(i - other) >= apart for other in picked):
            picked.append(i)
    return picked or [len(marked) // 2]


if __name__ == "__main__":
    run(main)
