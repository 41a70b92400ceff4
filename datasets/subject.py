"""One subject's volumes, cut into normalised slices on a common grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import aff2axcodes

from datasets.cohorts import MASKS, Cohort, Subject
from utils.cli import UserError
from utils.grid import SliceGeometry, VoxelGrid, place_grid, resample, resample_intensities
from utils.nifti import checksum, read_header, read_volume

BACKGROUND = -3.0  # the normalised value of background and of the lower quantile
BRIGHT = 3.0  # the normalised value of the upper quantile
BRATS_SLICES = SliceGeometry("LPS", (1.0, 1.0, 1.0), (240, 240))
DEPTH = 155  # slices of BraTS, and of every subject that is put on its grid, with the brain in their middle
# Share of the brain's voxels beyond this grid: a neck may be cut off, but no brain is so large.
MOST_OUTSIDE = 0.5
MOST_MISSING = 0.1  # share of the brain that a modality may leave out before that is said


@dataclass(frozen=True)
class Settings:
    """What one run of preprocessing does to each subject."""

    output_dir: Path
    modalities: tuple[str, ...]
    percentage_lower: float  # quantiles, in [0, 1]
    percentage_upper: float
    start: int  # slices [start, stop) of the third axis
    stop: int
    highest_label: int  # of a segmentation
    on_one_grid: bool  # the data are, and stay there; otherwise each subject is put on the grid of BraTS

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of slices that are written."""
        return (*self.modalities, *MASKS)

    def kinds_read(self, subject: Subject) -> tuple[str, ...]:
        """The kinds of volumes that a subject's slices depend on: sorted modalities, and the masks it has."""
        return (*sorted(self.modalities), *(kind for kind in MASKS if kind in subject.volumes))

    def describe(self, split: str, subject: Subject) -> dict:
        """All that a subject's slices depend on, in JSON's types."""
        return {
            "split": split,
            "modality": ",".join(sorted(self.modalities)),  # their order changes nothing
            "slices": f"{self.start} {self.stop}",
            "percentage_lower": self.percentage_lower,
            "percentage_upper": self.percentage_upper,
            "volumes": {kind: checksum(subject.volumes[kind]) for kind in self.kinds_read(subject)},
        }

    def require_depth(self, where: Path | str, depth: int) -> None:
        """Raise a UserError if something has not all the slices asked for."""
        if depth < self.stop:
            raise UserError(f"--slices {self.start} {self.stop} exceeds {where}, which has {depth} slices")


def check_subjects(settings: Settings, cohort: Cohort, names: Collection[str]) -> None:
    """Find what is wrong with the data or the flags before the first subject is cut.

    Raises:
        UserError: a subject lacks a volume, or no volume has all the slices asked for. Where only some volumes have
            too few slices, they are reported in their turn.
    """
    for subject in (cohort.subjects[name] for name in names):
        for kind in settings.kinds_read(subject):
            path = subject.volumes.get(kind)
            if path is None:
                remedy = f"fill it in, or leave {kind} out with --modality"
                raise UserError(f"{cohort.source} names no {kind} of {subject.name}: {remedy}")
            if not path.is_file():
                raise UserError(f"{path} is missing: restore it or take {subject.name} out of the data")
    if not settings.on_one_grid:
        return settings.require_depth("the grid of BraTS", DEPTH)
    shallow = None
    for name in names:
        path = cohort.subjects[name].volumes[settings.modalities[0]]
        try:
            depth = read_header(path).get_data_shape()[2]
        except UserError:  # reported in its turn, too
            continue
        if depth >= settings.stop:
            return None
        shallow = shallow or (path, depth)
    return settings.require_depth(*shallow) if shallow else None


class Cut(NamedTuple):
    """What has become of a subject."""

    made_with: dict  # what the slices depend on, as in `Settings.describe`, with the grid that they lie on
    # Images [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, one kind after the other: float32 for modalities, uint8
    # for seg and brainmask.
    slices: dict[str, np.ndarray]
    doubts: list[str]  # what may be wrong with its volumes
    nearest: int | None  # where none of its slices can be taken, the nearest one that could, if there is one


def cut_subject(settings: Settings, split: str, subject: Subject) -> Cut:
    """Normalise the subject's volumes and choose its slices.

    A UserError if a volume cannot be read or normalised, or does not fit the others; the message names the file.
    """
    made_with, volumes = settings.describe(split, subject), SubjectVolumes(settings)
    window = slice(settings.start, settings.stop)
    stacks = {}  # by kind: [H, W, stop - start]
    brainmask = None  # [H, W, D], where the data have one
    if "brainmask" in subject.volumes:
        brainmask = volumes.read_labels(subject.volumes["brainmask"]) > 0
    brain = False  # [H, W, D]
    shown = {}  # by modality: where it is not 0, bool [H, W, D]
    # On a grid of its own, a subject looks the same in whatever order the modalities are asked for.
    for modality in settings.modalities if settings.on_one_grid else sorted(settings.modalities):
        path = subject.volumes[modality]
        volume = volumes.read_intensities(path)
        if brainmask is not None:
            volume = np.where(brainmask, volume, 0)
        try:
            image = normalise(volume, settings.percentage_lower, settings.percentage_upper)
        except ValueError as error:
            raise UserError(f"{path} cannot be normalised, {error}") from error
        stacks[modality] = image[:, :, window].copy()  # a view would keep the whole volume in memory
        shown[modality] = volume != 0
        brain = brain | shown[modality]
    brain = brain if brainmask is None else brainmask
    lesions = read_lesions(volumes, subject, brain)
    stacks["brainmask"] = brain[:, :, window].astype(np.uint8)
    stacks["seg"] = lesions[:, :, window]

    chosen = choose_slices(split, stacks["seg"], stacks["brainmask"])
    slices = {
        f"{kind}/{subject.name}_{kind}_{settings.start + index}.npy": stack[:, :, index].copy()
        for kind, stack in stacks.items()
        for index in chosen
    }
    nearest = None
    if not chosen:
        others = choose_slices(split, lesions, brain)
        nearest = min(others, key=lambda i: max(settings.start - i, i + 1 - settings.stop), default=None)
    return Cut(made_with | {"grid": volumes.slice_geometry()}, slices, find_doubts(shown, brain), nearest)


def find_doubts(shown: Mapping[str, np.ndarray], brain: np.ndarray) -> list[str]:
    """What may be wrong with volumes that can be read.

    `shown` says, by modality, where it is not 0, bool [H, W, D]; `brain` is the brain of all of them together.
    """
    doubts = []
    for modality, shows in shown.items():
        if np.count_nonzero(brain & ~shows) > MOST_MISSING * np.count_nonzero(brain):
            doubts.append(f"{modality} is 0 in more than {MOST_MISSING:.0%} of the brain")
        (filled,) = shows.any(axis=(0, 1)).nonzero()
        if len(filled) < filled[-1] - filled[0] + 1:
            doubts.append(f"{modality} has empty slices between others")
    return doubts


class SubjectVolumes:
    """Reads the volumes of one subject onto one grid, which the first of them sets.

    Data on one grid stay where they are, and must all lie there. Each subject of other data is put on the grid of
    BraTS.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.path: Path | None = None  # of the first volume
        self.grid: VoxelGrid | None = None

    def read(self, path: Path) -> tuple[np.ndarray, VoxelGrid]:
        """A volume as it lies in its file, and its own grid; a UserError if it does not fit the subject's grid."""
        volume, grid = read_volume(path)
        if self.grid is None:
            self.path = path
            self.grid = grid if self.settings.on_one_grid else place_like_brats(path, volume != 0, grid)
        if self.settings.on_one_grid:
            if grid.shape != self.grid.shape:
                raise UserError(f"{path} has shape {grid.shape}, but {self.path.name} has {self.grid.shape}")
            if not np.allclose(grid.affine, self.grid.affine, atol=1e-3):  # mm; headers round to float32
                raise UserError(f"{path} lies elsewhere in space than {self.path.name}, their affines differ")
            self.settings.require_depth(path, grid.shape[2])
        return volume, grid

    def read_intensities(self, path: Path) -> np.ndarray:
        """A modality [H, W, D] on the subject's grid; a UserError as from `read`."""
        volume, grid = self.read(path)
        return volume if self.settings.on_one_grid else resample_intensities(volume, grid.affine, self.grid)

    def read_labels(self, path: Path) -> np.ndarray:
        """A mask on the subject's grid, uint8 [H, W, D].

        A UserError as from `read`, or for other labels than the data set knows, or none on the grid.
        """
        labels, grid = self.read(path)
        highest, marked = self.settings.highest_label, labels[labels != 0]  # few voxels: searched quickly
        unknown = marked[~np.isin(marked, range(highest + 1))]
        if unknown.size:
            raise UserError(f"{path} must hold labels, whole numbers from 0 to {highest}, but holds {unknown[0]:g}")
        labels = labels.astype(np.uint8)
        if self.settings.on_one_grid:
            return labels
        moved = resample(labels, grid.affine, self.grid, order=0)
        if labels.any() and not moved.any():
            raise UserError(f"{path} lies elsewhere in space than {self.path.name}, nothing of it is left")
        return moved

    def slice_geometry(self) -> dict | None:
        """What the subject's slices lie on, in JSON's types; None where its affine makes no sense of one."""
        if not self.settings.on_one_grid:
            return BRATS_SLICES.to_json()
        return None if None in aff2axcodes(self.grid.affine) else SliceGeometry.of_volume(self.grid).to_json()


def place_like_brats(path: Path, brain: np.ndarray, grid: VoxelGrid) -> VoxelGrid:
    """Where a scan with this brain, bool [I, J, K], is to lie: [240, 240, 155], the brain in the middle.

    One of just as many voxels of this size keeps them: such a scan is one of BraTS, whatever its orientation.
    """
    try:
        target, outside = place_grid(BRATS_SLICES, brain, grid.affine)
        if target.shape[2] != DEPTH or sorted(grid.shape) != sorted(target.shape):
            target, outside = place_grid(BRATS_SLICES, brain, grid.affine, DEPTH)
        if outside > MOST_OUTSIDE:
            raise ValueError(f"{outside:.0%} of its brain would lie outside")
    except ValueError as error:
        raise UserError(f"{path} cannot be put on the grid of BraTS, {error}") from error
    return target


def read_lesions(volumes: SubjectVolumes, subject: Subject, brain: np.ndarray) -> np.ndarray:
    """The subject's labels, uint8 [H, W, D]; zeros where it has none and is declared healthy.

    A UserError as from `read_labels`, or for a lesion in somebody healthy or outside the brain, where that of another
    scan lies once both are put on the grid.
    """
    if "seg" not in subject.volumes:
        return np.zeros(volumes.grid.shape, np.uint8)
    path = subject.volumes["seg"]
    labels = volumes.read_labels(path)
    if subject.healthy and labels.any():
        raise UserError(f"{path} holds a lesion, but {subject.name} is declared healthy")
    if not volumes.settings.on_one_grid and labels.any() and not labels[brain].any():
        raise UserError(f"{path} holds a lesion, but none of it lies in the brain of {volumes.path.name}")
    return labels


def normalise(volume: np.ndarray, percentage_lower: float, percentage_upper: float) -> np.ndarray:
    """Scale intensities linearly, so that two quantiles of the brain land on -3 and +3.

    The brain is every voxel that is not 0. Those below 0 belong to it: real scans have them.

    Args:
        volume: raw intensities, of any shape and any real dtype; background is 0.
        percentage_lower: the quantile of the brain's voxels, in [0, 1], that becomes -3; darker voxels do, too.
        percentage_upper: the quantile, in (percentage_lower, 1], that becomes +3; brighter voxels go beyond.

    Returns:
        float32 array of the same shape, nothing below -3, background exactly -3.

    A ValueError if no voxel but 0, a voxel that is not finite, two quantiles that coincide, or a range of intensities
    that floating point cannot scale.
    """
    brain = volume != 0
    voxels = volume[brain]
    if voxels.size == 0:
        raise ValueError("every voxel is 0")
    if not np.isfinite(voxels).all():
        raise ValueError("some voxels are not finite")
    with np.errstate(all="ignore"):  # whatever overflows is not finite at the end
        low, high = np.quantile(voxels, [percentage_lower, percentage_upper]).astype(np.float64)
        if np.isclose(low, high, rtol=1e-6, atol=0):  # what is between them is float32's rounding
            raise ValueError(f"its {percentage_lower:g} and {percentage_upper:g} quantiles are both {low:g}")
        image = np.full(volume.shape, BACKGROUND, dtype=np.float32)
        scaled = (voxels - low) / (high - low) * (BRIGHT - BACKGROUND) + BACKGROUND
        image[brain] = np.maximum(scaled, BACKGROUND)
    if not np.isfinite(image).all():
        raise ValueError("its intensities differ by too many orders of magnitude")
    return image


def choose_slices(split: str, seg: np.ndarray, brainmask: np.ndarray) -> list[int]:
    """Which of N slices go into `split`, ascending; those without brain never do.

    Args:
        split: "train" for every slice without tumour; "val" or "test" for the one with the largest tumour (the
            first of equals), or none where there is no tumour.
        seg: labels, [H, W, N]; tumour is > 0.
        brainmask: [H, W, N]; brain is > 0.
    """
    tumour_area = (seg > 0).sum(axis=(0, 1))  # pixels
    has_brain = brainmask.any(axis=(0, 1))
    if split == "train":
        return (has_brain & (tumour_area == 0)).nonzero()[0].tolist()
    tumour_area[~has_brain] = 0
    return [int(tumour_area.argmax())] if tumour_area.any() else []
