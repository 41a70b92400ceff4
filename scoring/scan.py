"""A scan's way in and out: onto the grid of the training slices, through the cycle, and back to where the scan lies."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor

from datasets.brats2021 import resize_image, resize_mask
from datasets.subject import BRATS_SLICES, normalise
from evaluation.figures import scan_figure
from evaluation.metrics import RIM, scored_region
from evaluation.results import SCORE_MEANINGS
from evaluation.scores import (
    FAR_OFF,
    Constants,
    ScoreSettings,
    anomaly_map,
    far_off,
    intensity_maps,
    smooth_scores,
)
from models.cycle import anomaly_score
from utils.cli import UserError
from utils.experiment import RECORD
from utils.files import replaced
from utils.grid import SAME, SliceGeometry, VoxelGrid, place_grid, resample, resample_intensities
from utils.nifti import read_header, read_volume, write_like

from .chain import Chain, TrainedTranslator
from .scorer import Scorer, announce

RESULTS = ("_anomaly.nii.gz", "_mask.nii.gz", "_report.png")  # what is written of each scan
# Litres: adults have 1 to 1.9, a head with its skull 3 and more, a field full of noisy air 8.
LARGEST_BRAIN = 2.2
SHOWN = 6  # slices in a report
APART = 6.0  # mm, at least, between two of them


class Scan(NamedTuple):
    """A scan, and what the networks are to see of it."""

    path: Path
    voxels: np.ndarray  # float32 [I, J, K] as in the file, normalised
    grid: VoxelGrid  # of the voxels
    chosen: np.ndarray  # bool [I, J, K]: the brain of the slices asked for
    slices_grid: VoxelGrid  # where its slices lie for the networks, with the geometry of the training data
    image: np.ndarray  # float32 [H, W, D] there, normalised
    brain: np.ndarray  # bool [H, W, D]
    numbers: np.ndarray  # which of the D slices are to be scored
    warnings: list[str]
    reference: np.ndarray  # float32 [H, W, D]: what the cycle ends in, the image or the other modality


def trained_geometry(translator: TrainedTranslator) -> SliceGeometry:
    """The geometry of the slices that a translator was trained on; BraTS's where there is no record of it.

    A UserError if the record is damaged.
    """
    recorded = translator.preprocessing.get("grid")
    try:
        return SliceGeometry.from_json(recorded) if recorded else BRATS_SLICES
    except (KeyError, TypeError, ValueError) as error:
        record = translator.checkpoint.parent / RECORD
        raise UserError(f"{record} is not what training writes: restore it") from error


def read_scan(
    path: Path,
    geometry: SliceGeometry,
    quantiles: dict[str, float],
    slices: tuple[int, int] | None,
    other: Path | None = None,
) -> Scan:
    """Read a scan, put it on slices like those of the training data, and normalise it as these were.

    Args:
        path: of the volume.
        geometry: of the training data's slices.
        quantiles: `percentage_lower` and `percentage_upper`, as preprocessing has them.
        slices: the scan's own axial slices [start, stop) that are asked for; None: all.
        other: volume of the same head in the modality that it is translated to, in the same space; None: not needed.

    A UserError if it cannot be read or normalised, has not so many slices, or no brain in them.
    """
    volume, grid = read_volume(path)
    brain = volume != 0
    try:
        if not np.isfinite(volume).all():
            raise ValueError("some voxels are not finite")
        slices_grid, cut_off = place_grid(geometry, brain, grid.affine)
        moved = resample_intensities(volume, grid.affine, slices_grid)
        voxels, image = normalise(volume, **quantiles), normalise(moved, **quantiles)
    except ValueError as error:
        raise UserError(f"{path} cannot be scored, {error}") from error
    reference = read_onto(other, slices_grid, quantiles, moved != 0) if other else image

    chosen = brain
    if slices:
        axis = axial_axis(grid.affine)
        if slices[1] > grid.shape[axis]:
            raise UserError(
                f"--slices {slices[0]} {slices[1]} exceeds {path}, which has {grid.shape[axis]} axial slices"
            )
        index = tuple(slice(*slices) if i == axis else slice(None) for i in range(3))
        chosen = np.zeros_like(brain)
        chosen[index] = brain[index]
    # All slices that the way back interpolates between: those on either side of a chosen voxel.
    *steps, depth = (np.linalg.inv(slices_grid.affine) @ grid.affine)[2]
    for step, index in zip(steps, np.ogrid[tuple(map(slice, grid.shape))], strict=True):
        depth = depth + step * index
    beside = np.stack([np.floor(depth[chosen] + SAME), np.ceil(depth[chosen] - SAME)])
    numbers = np.flatnonzero(np.isin(np.arange(slices_grid.shape[2]), beside) & (moved != 0).any(axis=(0, 1)))
    if not numbers.size:  # nothing there at all, or only stray voxels that coarser slices miss
        where = f"in --slices {slices[0]} {slices[1]}" if slices else "on the slices of the training data"
        raise UserError(f"{path} has no brain {where}")

    warnings = []
    litres = np.count_nonzero(brain) * abs(np.linalg.det(grid.affine[:3, :3])) / 1e6
    if litres > LARGEST_BRAIN:
        warnings.append(
            f"{litres:.1f} litres of it are not 0, and no brain is larger than {LARGEST_BRAIN}: it does not look "
            "skull-stripped, or its background is not 0; the networks have never seen the like"
        )
    if cut_off > 0.001:
        seen = "{} × {} px that the networks see".format(*geometry.shape)
        warnings.append(f"{100 * cut_off:.1f} % of its brain lie outside the {seen}, and are not judged")
    header = read_header(path)
    if header["sform_code"] == header["qform_code"] == 0:
        directions = ", ".join(nibabel.aff2axcodes(grid.affine))
        warnings.append(f"its header does not say how it lies: its axes are taken to lead to {directions}")
    return Scan(path, voxels, grid, chosen, slices_grid, image, moved != 0, numbers, warnings, reference)


def read_onto(path: Path, slices_grid: VoxelGrid, quantiles: dict[str, float], brain: np.ndarray) -> np.ndarray:
    """A volume on slices [H, W, D] of a scan with this brain there, normalised.

    A UserError if it cannot be read or normalised, or lies elsewhere.
    """
    volume, grid = read_volume(path)
    try:
        if not np.isfinite(volume).all():
            raise ValueError("some voxels are not finite")
        moved = resample_intensities(volume, grid.affine, slices_grid)
        if np.count_nonzero(brain & (moved != 0)) < np.count_nonzero(brain) / 2:
            raise ValueError("less than half of the scan's brain lies in it: register the two")
        return normalise(moved, **quantiles)
    except ValueError as error:
        raise UserError(f"{path} cannot be compared with, {error}") from error


def axial_axis(affine: np.ndarray) -> int:
    """Which axis of a volume leads from feet to head, or back."""
    return io_orientation(affine)[:, 0].tolist().index(2)


class ScanScore(NamedTuple):
    """A score of a scan, alone or as a part of a weighted sum."""

    chain: Chain | None  # None: the bare intensity
    usual_error: float  # constant of the published "standardised" score
    chosen: tuple[ScoreSettings, Constants] | None  # None: the published score
    weight: float = 1.0
    scorer: Scorer | None = None  # of the chain


def score_scan(parts: Sequence[ScanScore], scan: Scan) -> np.ndarray:
    """The anomaly score of every voxel of a scan, float32 [I, J, K]; 0 outside its brain or on a rim that is cut.

    The weighted sum of the `parts`, of which at least one has translators.
    """
    config = next(part.scorer for part in parts if part.scorer).config
    images, reference, brains = (
        torch.from_numpy(np.moveaxis(stack[:, :, scan.numbers], 2, 0)[:, None].copy())
        for stack in (scan.image, scan.reference, scan.brain.view(np.uint8))
    )
    size = config.data.image_size
    images, reference = (torch.stack([resize_image(one, size) for one in stack]) for stack in (images, reference))
    brains = torch.stack([resize_mask(brain, size) for brain in brains])

    total = sum(part.weight * score_slices(part, scan, images, reference, brains) for part in parts)
    scores = F.interpolate(torch.from_numpy(total), scan.slices_grid.shape[:2], mode="bilinear", antialias=True)
    on_slices = np.zeros(scan.slices_grid.shape, dtype=np.float32)
    on_slices[:, :, scan.numbers] = np.moveaxis(scores[:, 0].numpy(), 0, 2)
    anomaly = resample(on_slices, scan.slices_grid.affine, scan.grid)
    return np.where(scan.chosen, anomaly, np.float32(0))


def score_slices(part: ScanScore, scan: Scan, images: Tensor, reference: Tensor, brains: Tensor) -> np.ndarray:
    """One score of a scan's slices, float32 [N, 1, H, W]; images, what they are compared with, and masks likewise."""
    maps = {"image": reference[:, 0].numpy(), "brainmask": brains[:, 0].numpy()}
    maps["names"] = [f"{scan.path.name}_{number}" for number in scan.numbers]
    rim = part.chosen[0].rim if part.chosen else RIM
    if part.scorer:
        announce(part.scorer, brains)
        cycle = part.scorer.cycle(images, brains, reference)
        maps |= {"reconstruction": cycle.reconstruction[:, 0].numpy(), "variance": cycle.variance[:, 0].numpy()}
    else:
        maps = intensity_maps(maps, part.chosen[0].sign)
    if part.chosen:
        scores = anomaly_map(maps, *part.chosen)
        far = far_off(maps, part.chosen[1]) if part.scorer else {}
        for slope in far.values():
            print(FAR_OFF.format(scan.path, slope))
    else:
        scores = anomaly_score(reference, cycle, part.scorer.score_kind, part.usual_error)[:, 0].numpy()
        scores = smooth_scores(scores, part.scorer.config.score_model.sampling.smooth)
    return np.where(scored_region(maps["brainmask"], rim), scores, np.float32(0))[:, None]


def write_results(stem: Path, scan: Scan, anomaly: np.ndarray, threshold: float, figure: Figure) -> None:
    """Write the score, the mask and the report of a scan, and say in a line what is in them.

    The files' names begin as `stem`. A UserError if they cannot be written.
    """
    mask = (anomaly >= threshold).astype(np.uint8)
    with replaced(stem.parent, "--output_dir") as new:
        paths = [new / (stem.name + result) for result in RESULTS]
        header = read_header(scan.path)
        for path, voxels in zip(paths, (anomaly, mask), strict=False):
            write_like(header, voxels, scan.grid.affine, path)
        figure.savefig(paths[-1], dpi=110)
    millilitres = np.count_nonzero(mask) * abs(np.linalg.det(scan.grid.affine[:3, :3])) / 1000
    print(f"{millilitres:.1f} ml at or above the threshold, highest score {anomaly.max():.3g}: {stem}{RESULTS[-1]}")


def draw_report(scan: Scan, anomaly: np.ndarray, threshold: float, score: str) -> Figure:
    """The scan's most anomalous axial slices, as radiologists look at them, numbered as in its file."""
    mask = (anomaly >= threshold).astype(np.uint8)
    turn = ornt_transform(io_orientation(scan.grid.affine), axcodes2ornt("LPS"))
    sizes = voxel_sizes(scan.grid.affine)[np.argsort(turn[:, 0])]  # mm along the turned axes
    image, anomaly, mask = (
        np.moveaxis(apply_orientation(volume, turn), 2, 0) for volume in (scan.voxels, anomaly, mask)
    )
    picked = pick_slices(mask.sum(axis=(1, 2)), anomaly.sum(axis=(1, 2)), round(APART / sizes[2]))
    upside_down = turn[axial_axis(scan.grid.affine), 1] < 0
    labels = [
        f"slice {len(image) - 1 - i if upside_down else i}\n"
        f"{mask[i].sum() * sizes[0] * sizes[1] / 100:.1f} cm² marked, score ≤ {anomaly[i].max():.3g}"
        for i in picked
    ]
    title = f"{scan.path.name}: the slices with the most marked, most first (R: the patient's right)"
    look = {"threshold": threshold, "aspect": sizes[1] / sizes[0], "title": title, "meaning": SCORE_MEANINGS[score]}
    return scan_figure(image[picked], anomaly[picked], mask[picked] > 0, labels, **look)


def pick_slices(marked: np.ndarray, scores: np.ndarray, apart: int) -> list[int]:
    """The slices with the most marked voxels [N], or else the highest sum of scores [N], most first.

    At most SHOWN of them, none without any score, and no two fewer than `apart` slices apart.
    """
    picked: list[int] = []
    for i in np.lexsort((scores, marked))[::-1].tolist():
        if len(picked) < SHOWN and scores[i] > 0 and all(abs(i - other) >= apart for other in picked):
            picked.append(i)
    return picked or [len(marked) // 2]
