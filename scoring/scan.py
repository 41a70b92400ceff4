"""Score a NIfTI scan: resample it onto the training grid, run the cycle, and resample the scores back."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor

from datasets.brats2021 import resize_image, resize_mask
from datasets.quality import brain_warnings, intensity_warnings, require_background
from datasets.subject import BRATS_SLICES, normalise
from evaluation.figures import scan_figure
from evaluation.metrics import RIM, scored_region
from evaluation.results import SCORE_MEANINGS
from evaluation.scores import (
    CONTRAST_WARNING,
    Constants,
    ScoreSettings,
    anomaly_map,
    intensity_maps,
    smooth_scores,
    unusual_contrasts,
)
from models.cycle import anomaly_score
from utils.cli import UserError
from utils.experiment import RECORD
from utils.files import replaced
from utils.grid import TOLERANCE, SliceGeometry, VoxelGrid, place_grid, resample, resample_intensities
from utils.nifti import checksum, header_warnings, read_header, read_volume, write_like

from .chain import Chain, TrainedTranslator
from .scorer import Scorer, print_cost

RESULT_SUFFIXES = ("_anomaly.nii.gz", "_mask.nii.gz", "_report.png")
REPORT_SLICES = 6
REPORT_SPACING = 6.0  # minimum distance of two slices in a report, in mm


class Scan(NamedTuple):
    """A normalised scan, on the voxel grid of its file and resampled onto the training grid."""

    path: Path
    voxels: np.ndarray  # float32 [I, J, K]
    grid: VoxelGrid  # of the file
    roi: np.ndarray  # bool [I, J, K]: brain voxels in the slices to score
    training_grid: VoxelGrid  # same space as `grid`, but with the geometry of the training slices
    image: np.ndarray  # float32 [H, W, D]
    brain: np.ndarray  # bool [H, W, D]
    slice_indices: np.ndarray  # of the slices to score, out of D
    warnings: list[str]
    reference: np.ndarray  # float32 [H, W, D]: `image`, or the target modality of a one-way score


def training_geometry(translator: TrainedTranslator) -> SliceGeometry:
    """Return the geometry of a translator's training slices, or that of BraTS if it was not recorded.

    Raises:
        UserError: if the record is damaged.
    """
    recorded = translator.preprocessing.get("grid")
    try:
        return SliceGeometry.from_json(recorded) if recorded else BRATS_SLICES
    except (KeyError, TypeError, ValueError) as error:
        record = translator.checkpoint.parent / RECORD
        raise UserError(f"{record} is damaged (data.grid): restore it") from error


def read_scan(
    path: Path,
    geometry: SliceGeometry,
    quantiles: dict[str, float],
    slices: tuple[int, int] | None,
    reference_path: Path | None = None,
) -> Scan:
    """Read a scan, resample it onto the training grid, and normalise it like the training data.

    Args:
        path: of the volume.
        geometry: of the training slices.
        quantiles: `percentage_lower` and `percentage_upper` of preprocessing.
        slices: range [start, stop) of the scan's own axial slices to score; None for all.
        reference_path: for a one-way score, a volume of the target modality in the same space.

    Raises:
        UserError: if a volume cannot be read or normalised, or `slices` exceeds the scan or contains no brain.
    """
    volume, grid = read_volume(path)
    brain = volume != 0
    try:
        require_background(volume)
        training_grid, cut_off = place_grid(geometry, brain, grid.affine)
        resampled = resample_intensities(volume, grid.affine, training_grid)
        voxels, image = normalise(volume, **quantiles), normalise(resampled, **quantiles)
    except ValueError as error:
        raise UserError(f"{path} cannot be scored: {error}") from error
    resampled_brain = resampled != 0
    reference = read_reference(reference_path, training_grid, quantiles, resampled_brain) if reference_path else image

    roi = brain
    if slices:
        axis = axial_axis(grid.affine)
        if slices[1] > grid.shape[axis]:
            raise UserError(f"--slices {slices[0]} {slices[1]} exceeds the {grid.shape[axis]} axial slices of {path}")
        index = tuple(slice(*slices) if i == axis else slice(None) for i in range(3))
        roi = np.zeros_like(brain)
        roi[index] = brain[index]
    # Score the slices on both sides of every voxel, because resampling back interpolates between them.
    *steps, depth = (np.linalg.inv(training_grid.affine) @ grid.affine)[2]
    for step, index in zip(steps, np.ogrid[tuple(map(slice, grid.shape))], strict=True):
        depth = depth + step * index
    adjacent = np.stack([np.floor(depth[roi] + TOLERANCE), np.ceil(depth[roi] - TOLERANCE)])
    indices = np.flatnonzero(np.isin(np.arange(training_grid.shape[2]), adjacent) & resampled_brain.any(axis=(0, 1)))
    if not indices.size:  # no brain voxels, or only isolated ones that the thicker training slices miss
        where = f"in --slices {slices[0]} {slices[1]}" if slices else "on the training grid"
        raise UserError(f"{path} has no brain {where}")

    warnings = [*header_warnings(path), *intensity_warnings(volume), *brain_warnings(brain, grid.affine)]
    if reference_path:
        warnings += [f"{reference_path}: {warning}" for warning in header_warnings(reference_path)]
    if cut_off > 0.001:
        field_of_view = "{} × {} px field of view".format(*geometry.shape)
        warnings.append(f"{100 * cut_off:.1f} % of the brain is outside the {field_of_view} and is not scored")
    return Scan(path, voxels, grid, roi, training_grid, image, resampled_brain, indices, warnings, reference)


def read_reference(path: Path, training_grid: VoxelGrid, quantiles: dict[str, float], brain: np.ndarray) -> np.ndarray:
    """Read the target modality of a scan whose brain mask is `brain`; return it like `Scan.image`.

    Raises:
        UserError: if the volume cannot be read or normalised, or covers less than half of the brain.
    """
    volume, grid = read_volume(path)
    try:
        require_background(volume)
        resampled = resample_intensities(volume, grid.affine, training_grid)
        if np.count_nonzero(brain & (resampled != 0)) < np.count_nonzero(brain) / 2:
            raise ValueError("it covers less than half of the scan's brain; register the two")
        return normalise(resampled, **quantiles)
    except ValueError as error:
        raise UserError(f"{path} cannot be compared with the translation: {error}") from error


def axial_axis(affine: np.ndarray) -> int:
    """Return the index of a volume's inferior-superior axis."""
    return io_orientation(affine)[:, 0].tolist().index(2)


class ScanScore(NamedTuple):
    """A score of a scan, on its own or as a member of a weighted sum."""

    chain: Chain | None  # None: the input's intensity
    error_floor: float  # constant c of the published "standardised" score
    chosen: tuple[ScoreSettings, Constants] | None  # None: the published score
    weight: float = 1.0
    scorer: Scorer | None = None  # the loaded chain


def score_scan(members: Sequence[ScanScore], scan: Scan) -> np.ndarray:
    """Return the weighted sum of `members`, float32 [I, J, K]; 0 outside `scan.roi` and on an excluded rim."""
    config = next(member.scorer for member in members if member.scorer).config
    images, reference, brains = (
        torch.from_numpy(np.moveaxis(stack[:, :, scan.slice_indices], 2, 0)[:, None].copy())
        for stack in (scan.image, scan.reference, scan.brain.view(np.uint8))
    )
    size = config.data.image_size
    images, reference = (torch.stack([resize_image(one, size) for one in stack]) for stack in (images, reference))
    brains = torch.stack([resize_mask(brain, size) for brain in brains])

    total = sum(member.weight * score_slices(member, scan, images, reference, brains) for member in members)
    scores = F.interpolate(torch.from_numpy(total), scan.training_grid.shape[:2], mode="bilinear", antialias=True)
    volume = np.zeros(scan.training_grid.shape, dtype=np.float32)
    volume[:, :, scan.slice_indices] = np.moveaxis(scores[:, 0].numpy(), 0, 2)
    anomaly = resample(volume, scan.training_grid.affine, scan.grid)
    return np.where(scan.roi, anomaly, np.float32(0))


def score_slices(member: ScanScore, scan: Scan, images: Tensor, reference: Tensor, brains: Tensor) -> np.ndarray:
    """Return one score of a scan's slices, float32 [N, 1, H, W], from images, references and masks of this shape."""
    maps = {"image": reference[:, 0].numpy(), "brainmask": brains[:, 0].numpy()}
    maps["names"] = [f"{scan.path.name}_{index}" for index in scan.slice_indices]
    rim = member.chosen[0].rim if member.chosen else RIM
    if member.scorer:
        print_cost(member.scorer, brains)
        cycle = member.scorer.cycle(images, brains, reference)
        maps |= {"reconstruction": cycle.reconstruction[:, 0].numpy(), "variance": cycle.variance[:, 0].numpy()}
    else:
        maps = intensity_maps(maps, member.chosen[0].sign)
    if member.chosen:
        scores = anomaly_map(maps, *member.chosen)
        contrasts = unusual_contrasts(maps, member.chosen[1]) if member.scorer else {}
        for slope in contrasts.values():
            print(CONTRAST_WARNING.format(scan.path, slope))
    else:
        scores = anomaly_score(reference, cycle, member.scorer.score_kind, member.error_floor)[:, 0].numpy()
        scores = smooth_scores(scores, member.scorer.config.score_model.sampling.smooth)
    return np.where(scored_region(maps["brainmask"], rim), scores, np.float32(0))[:, None]


def description_of(scan: Path) -> bytes:
    """Return the `descrip` of the headers of a scan's results, which tells scans of the same name apart."""
    return f"anomalies of the scan with CRC-32 {checksum(scan):08x}".encode()


def is_result(path: Path, scan: Path) -> bool:
    """Return whether a volume is a result of this scan."""
    description = description_of(scan)
    try:
        return read_header(path)["descrip"].item() == description
    except UserError:
        return False


def write_results(stem: Path, scan: Scan, anomaly: np.ndarray, threshold: float, figure: Figure) -> None:
    """Write the score, the mask and the report of a scan to `stem` + `RESULT_SUFFIXES`, and print a summary.

    Raises:
        UserError: if the files cannot be written.
    """
    mask = (anomaly >= threshold).astype(np.uint8)
    with replaced(stem.parent, "--output_dir") as new:
        paths = [new / (stem.name + suffix) for suffix in RESULT_SUFFIXES]
        header = read_header(scan.path)
        header["descrip"] = description_of(scan.path)
        for path, voxels in zip(paths, (anomaly, mask), strict=False):
            write_like(header, voxels, scan.grid.affine, path)
        figure.savefig(paths[-1], dpi=110)
    ml = np.count_nonzero(mask) * abs(np.linalg.det(scan.grid.affine[:3, :3])) / 1000
    print(f"{ml:.1f} ml at or above the threshold, highest score {anomaly.max():.3g}: {stem}{RESULT_SUFFIXES[-1]}")


def draw_report(scan: Scan, anomaly: np.ndarray, threshold: float, score: str) -> Figure:
    """Draw the scan's most anomalous axial slices in radiological orientation, numbered as in its file."""
    mask = (anomaly >= threshold).astype(np.uint8)
    to_lps = ornt_transform(io_orientation(scan.grid.affine), axcodes2ornt("LPS"))
    sizes = voxel_sizes(scan.grid.affine)[np.argsort(to_lps[:, 0])]  # mm along the axes of LPS
    image, anomaly, mask = (np.moveaxis(apply_orientation(one, to_lps), 2, 0) for one in (scan.voxels, anomaly, mask))
    picked = pick_slices(mask.sum(axis=(1, 2)), anomaly.sum(axis=(1, 2)), round(REPORT_SPACING / sizes[2]))
    upside_down = to_lps[axial_axis(scan.grid.affine), 1] < 0
    labels = [
        f"slice {len(image) - 1 - i if upside_down else i}\n"
        f"{mask[i].sum() * sizes[0] * sizes[1] / 100:.1f} cm² marked, score ≤ {anomaly[i].max():.3g}"
        for i in picked
    ]
    title = f"{scan.path.name}: slices with the largest marked area, largest first (R: patient's right)"
    options = {"threshold": threshold, "aspect": sizes[1] / sizes[0], "title": title, "meaning": SCORE_MEANINGS[score]}
    return scan_figure(image[picked], anomaly[picked], mask[picked] > 0, labels, **options)


def pick_slices(marked: np.ndarray, scores: np.ndarray, spacing: int) -> list[int]:
    """Return up to `REPORT_SLICES` slices, sorted by marked voxels [N], then by sum of scores [N], largest first.

    They are at least `spacing` slices apart and have scores above 0; without any such slice, return the middle one.
    """
    picked: list[int] = []
    for i in np.lexsort((scores, marked))[::-1].tolist():
        if len(picked) < REPORT_SLICES and scores[i] > 0 and all(abs(i - other) >= spacing for other in picked):
            picked.append(i)
    return picked or [len(marked) // 2]
