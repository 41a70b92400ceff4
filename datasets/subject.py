"""Normalised slices of one subject's volumes on a common grid."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import aff2axcodes
from tqdm import tqdm

from datasets.cohorts import MASKS, Cohort, Subject
from datasets.quality import (
    BACKGROUND,
    MAX_INTENSITY,
    brain_warnings,
    coverage_warnings,
    intensity_warnings,
    require_background,
)
from utils.cli import UserError
from utils.grid import SliceGeometry, VoxelGrid, place_grid, resample, resample_intensities
from utils.nifti import checksum, find_copies, header_warnings, read_header, read_volume

UPPER = 3.0  # normalised intensity of the upper quantile
BRATS_SLICES = SliceGeometry("LPS", (1.0, 1.0, 1.0), (240, 240))
DEPTH = 155  # number of slices of the BraTS grid
MAX_OUTSIDE = 0.5  # share of the non-zero voxels outside that grid: a neck may be cut off, but not half of a brain
MAX_ROUNDING = 0.05  # difference of a label in a resampled mask from the whole number that it stands for
RULES = 1  # version of the rules by which slices are made: raise it when the same volumes would give other slices


@dataclass(frozen=True)
class Settings:
    """Preprocessing settings of one run."""

    output_dir: Path
    modalities: tuple[str, ...]
    percentage_lower: float  # quantiles, in [0, 1]
    percentage_upper: float
    start: int  # slices [start, stop) of the third axis
    stop: int
    max_label: int  # in a segmentation
    shared_grid: bool  # all subjects keep their common grid; otherwise each is resampled onto the BraTS grid
    test_slices: str = "largest"  # of val and test subjects, one of TEST_SLICES

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of slices that are written."""
        return (*self.modalities, *MASKS)

    def input_kinds(self, subject: Subject) -> tuple[str, ...]:
        """Return the kinds of volumes that are read for a subject: sorted modalities, and the masks it has."""
        return (*sorted(self.modalities), *(kind for kind in MASKS if kind in subject.volumes))

    def describe(self, split: str, subject: Subject) -> dict:
        """Return the provenance of a subject's slices, JSON-serialisable: all settings and inputs they depend on."""
        return {
            "rules": RULES,
            "split": split,
            "modality": ",".join(sorted(self.modalities)),  # the slices do not depend on their order
            "slices": f"{self.start} {self.stop}",
            "test_slices": self.test_slices,
            "percentage_lower": self.percentage_lower,
            "percentage_upper": self.percentage_upper,
            "volumes": {kind: checksum(subject.volumes[kind]) for kind in self.input_kinds(subject)},
        }

    def require_depth(self, where: Path | str, depth: int) -> None:
        """Raise a UserError if a volume or grid is too shallow for the requested slices."""
        if depth < self.stop:
            raise UserError(f"--slices {self.start} {self.stop} exceeds {where}, which has {depth} slices")


def check_subjects(settings: Settings, cohort: Cohort, names: Collection[str]) -> None:
    """Check the data and the flags before the first subject is sliced.

    Raises:
        UserError: if a subject lacks a volume, two volumes are the same scan, or no volume has all of the requested
            slices. If only some volumes have too few, `slice_subject` reports each of them.
    """
    for subject in (cohort.subjects[name] for name in names):
        for kind in settings.input_kinds(subject):
            path = subject.volumes.get(kind)
            if path is None:
                remedy = f"add it, or leave {kind} out with --modality"
                raise UserError(f"{cohort.source} has no {kind} for {subject.name}: {remedy}")
            if not path.is_file():
                raise UserError(f"{path} is missing: restore it or remove {subject.name} from the data")
    paths = [cohort.subjects[name].volumes[kind] for name in names for kind in settings.modalities]
    if copies := find_copies(tqdm(paths, desc="comparing volumes", unit="volume", leave=False, disable=None)):
        raise UserError("{} and {} are the same scan: give each subject and modality its own".format(*copies))
    if not settings.shared_grid:
        return settings.require_depth("the BraTS grid", DEPTH)
    shallow = None
    for name in names:
        path = cohort.subjects[name].volumes[settings.modalities[0]]
        try:
            depth = read_header(path).get_data_shape()[2]
        except UserError:  # reported by `slice_subject`, too
            continue
        if depth >= settings.stop:
            return None
        shallow = shallow or (path, depth)
    return settings.require_depth(*shallow) if shallow else None


class SubjectSlices(NamedTuple):
    """The selected slices of a subject, their provenance, and warnings about its volumes."""

    made_with: dict  # provenance, as in `Settings.describe`, `grid` and `lesion`: whether the volume has one anywhere
    # [H, W] by `{kind}/{subject}_{kind}_{slice}.npy`, grouped by kind: float32 modalities, uint8 seg and brainmask.
    slices: dict[str, np.ndarray]
    warnings: list[str]  # see datasets/quality.py
    nearest: int | None  # if no slice in [start, stop) is usable, the nearest one outside that is, if any


def slice_subject(settings: Settings, split: str, subject: Subject) -> SubjectSlices:
    """Normalise a subject's volumes and select its slices.

    Raises:
        UserError: if a volume cannot be read or normalised, or does not match the others; the message names the file.
    """
    made_with, reader = settings.describe(split, subject), VolumeReader(settings, subject)
    window = slice(settings.start, settings.stop)
    stacks = {}  # by kind: [H, W, stop - start]
    brainmask = None  # bool [H, W, D], if the data include one
    if "brainmask" in subject.volumes:
        brainmask = reader.read_labels("brainmask")[0] > 0
    brain = False  # union of the modalities, bool [H, W, D]
    nonzero = {}  # by modality, bool [H, W, D]
    usable = True  # bool [D]: slices that show brain in all modalities, and whose lesions are known
    # The first volume sets a subject's own grid: sort, so that the order of --modality does not matter.
    for modality in settings.modalities if settings.shared_grid else sorted(settings.modalities):
        try:
            volume = reader.read_intensities(modality, brainmask)
            image = normalise(volume, settings.percentage_lower, settings.percentage_upper)
        except ValueError as error:
            raise UserError(f"{subject.volumes[modality]} cannot be normalised: {error}") from error
        stacks[modality] = image[:, :, window].copy()  # a view would keep the whole volume in memory
        nonzero[modality] = volume != 0
        brain = brain | nonzero[modality]
        usable = usable & (image > BACKGROUND).any(axis=(0, 1))
    brain = brain if brainmask is None else brainmask
    lesions, known = read_lesions(reader, subject, brain)
    usable = usable & known
    stacks["brainmask"] = brain[:, :, window].astype(np.uint8)
    stacks["seg"] = lesions[:, :, window]

    chosen = choose_slices(split, stacks["seg"], usable[window], settings.test_slices)
    slices = {
        f"{kind}/{subject.name}_{kind}_{settings.start + index}.npy": stack[:, :, index].copy()
        for kind, stack in stacks.items()
        for index in chosen
    }
    nearest = None
    if not chosen:
        others = choose_slices(split, lesions, usable, settings.test_slices)
        nearest = min(others, key=lambda i: max(settings.start - i, i + 1 - settings.stop), default=None)
    made_with |= {"grid": reader.slice_geometry(), "lesion": bool(lesions.any())}
    warnings = [*reader.warnings, *coverage_warnings(nonzero, brain), *brain_warnings(brain, reader.grid.affine)]
    if not known.all():
        warnings.append("seg ends before the brain, and slices that it does not cover are left out")
    return SubjectSlices(made_with, slices, warnings, nearest)


class VolumeReader:
    """Reader of one subject's volumes on a common grid, set by the first of them.

    With a shared grid, all volumes must already be on it. Otherwise they are resampled onto the BraTS grid.
    """

    def __init__(self, settings: Settings, subject: Subject):
        self.settings, self.subject = settings, subject
        self.first: Path | None = None  # path of the first volume
        self.grid: VoxelGrid | None = None
        self.warnings: list[str] = []  # about the volumes read so far

    def read(self, kind: str) -> tuple[np.ndarray, VoxelGrid]:
        """Read a volume and its grid without resampling; with a shared grid, check that the volume is on it."""
        path = self.subject.volumes[kind]
        volume, grid = read_volume(path)
        self.warnings += [f"{kind}: {warning}" for warning in header_warnings(path)]
        if kind not in MASKS and "brainmask" not in self.subject.volumes:
            require_background(volume)  # before a grid is placed around all that is not 0
        if self.grid is None:
            self.first = path
            self.grid = grid if self.settings.shared_grid else place_brats_grid(path, volume != 0, grid)
        if self.settings.shared_grid:
            if grid.shape != self.grid.shape:
                raise UserError(f"{path} has shape {grid.shape}, but {self.first.name} has {self.grid.shape}")
            if not np.allclose(grid.affine, self.grid.affine, atol=1e-3):  # mm; headers round to float32
                raise UserError(f"{path} has a different affine than {self.first.name}")
            self.settings.require_depth(path, grid.shape[2])
        return volume, grid

    def read_intensities(self, modality: str, brainmask: np.ndarray | None) -> np.ndarray:
        """Return a modality [H, W, D] on the common grid, 0 outside the brain mask, if there is one.

        Raises:
            UserError: as in `read`.
            ValueError: as from `require_background`, if there is no brain mask.
        """
        volume, grid = self.read(modality)
        self.warnings += [f"{modality}: {warning}" for warning in intensity_warnings(volume)]
        volume = volume if self.settings.shared_grid else resample_intensities(volume, grid.affine, self.grid)
        return volume if brainmask is None else np.where(brainmask, volume, 0)

    def read_labels(self, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a mask on the common grid, uint8 [H, W, D], and where its volume covers this grid, None if everywhere.

        Raises:
            UserError: as in `read`, if it has labels beyond max_label, or if resampling loses all of them.
        """
        labels, grid = self.read(kind)
        path, highest = self.subject.volumes[kind], self.settings.max_label
        found = labels[labels != 0]  # few voxels, quick to search
        whole = np.rint(found)
        unknown = found[~(np.abs(found - whole) <= MAX_ROUNDING) | ~np.isin(whole, range(highest + 1))]
        if unknown.size:
            raise UserError(f"{path} must hold labels, whole numbers from 0 to {highest}, but holds {unknown[0]:g}")
        if (found != whole).any():
            self.warnings.append(f"{kind}: labels up to {MAX_ROUNDING} off whole numbers are rounded")
        labels = (np.rint(labels) if labels.dtype.kind == "f" else labels).astype(np.uint8)
        if grid.shape == self.grid.shape and np.allclose(grid.affine, self.grid.affine, atol=1e-3):
            return labels, None
        numbers = resample(labels.astype(np.uint16) + 1, grid.affine, self.grid, order=0)  # 0 outside the volume
        covered = numbers > 0
        resampled = np.where(covered, numbers - 1, 0).astype(np.uint8)
        if labels.any() and not resampled.any():
            raise UserError(f"{path} has no label left on the grid of {self.first.name}, check its affine")
        return resampled, covered

    def slice_geometry(self) -> dict | None:
        """Return the grid of the slices as JSON, None if the affine defines no orientation."""
        if not self.settings.shared_grid:
            return BRATS_SLICES.to_json()
        return None if None in aff2axcodes(self.grid.affine) else SliceGeometry.of_volume(self.grid).to_json()


def place_brats_grid(path: Path, brain: np.ndarray, grid: VoxelGrid) -> VoxelGrid:
    """Return a BraTS grid, [240, 240, 155] voxels of 1 mm, centred on the brain, bool [I, J, K].

    A scan that already has this shape and voxel size, in any orientation, keeps its voxels.
    """
    try:
        target, outside = place_grid(BRATS_SLICES, brain, grid.affine)
        if target.shape[2] != DEPTH or sorted(grid.shape) != sorted(target.shape):
            target, outside = place_grid(BRATS_SLICES, brain, grid.affine, DEPTH)
        if outside > MAX_OUTSIDE:
            raise ValueError(f"{outside:.0%} of its brain would be outside")
    except ValueError as error:
        raise UserError(f"{path} cannot be resampled onto the BraTS grid: {error}") from error
    return target


def read_lesions(reader: VolumeReader, subject: Subject, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lesion labels, uint8 [H, W, D], and for each slice whether the seg covers its brain, bool [D].

    A subject that is declared healthy and has no seg has no lesion anywhere.

    Raises:
        UserError: as in `read_labels`, if a healthy subject has a lesion, or if all lesions are outside the brain.
    """
    if "seg" not in subject.volumes:
        return np.zeros(brain.shape, np.uint8), np.ones(brain.shape[2], bool)
    path = subject.volumes["seg"]
    labels, covered = reader.read_labels("seg")
    if subject.healthy and labels.any():
        raise UserError(f"{path} has a lesion, but {subject.name} is declared healthy")
    if not reader.settings.shared_grid and labels.any() and not labels[brain].any():
        raise UserError(f"{path} has a lesion, but all of it is outside the brain of {reader.first.name}")
    return labels, np.ones(brain.shape[2], bool) if covered is None else ~(brain & ~covered).any(axis=(0, 1))


def normalise(volume: np.ndarray, percentage_lower: float, percentage_upper: float) -> np.ndarray:
    """Scale intensities linearly so that two quantiles of the brain map to -3 and +3.

    The brain is every voxel that is not 0, including negative ones, which occur in real scans.

    Args:
        volume: raw intensities of any shape and real dtype; the background is 0.
        percentage_lower: quantile in [0, 1] that maps to -3; darker voxels are clipped to -3.
        percentage_upper: quantile in (percentage_lower, 1] that maps to +3; brighter voxels are not clipped.

    Returns:
        float32 array of the same shape, with a background of exactly -3.

    Raises:
        ValueError: if all voxels are 0, any is not finite, the quantiles are equal, or a result exceeds MAX_INTENSITY.
    """
    if volume.flags.fnc:  # as NIfTI volumes are: masks are much slower across the order of memory
        return normalise(volume.T, percentage_lower, percentage_upper).T
    brain = volume != 0
    voxels = volume[brain]
    if voxels.size == 0:
        raise ValueError("every voxel is 0")
    if not np.isfinite(voxels).all():
        raise ValueError("some voxels are not finite")
    with np.errstate(all="ignore"):  # an overflow is detected below as a value that is not finite
        low, high = np.quantile(voxels, [percentage_lower, percentage_upper]).astype(np.float64)
        if np.isclose(low, high, rtol=1e-6, atol=0):  # equal up to float32 rounding
            raise ValueError(f"its {percentage_lower:g} and {percentage_upper:g} quantiles are both {low:g}")
        image = np.full(volume.shape, BACKGROUND, dtype=np.float32)
        scaled = (voxels - low) / (high - low) * (UPPER - BACKGROUND) + BACKGROUND
        image[brain] = np.maximum(scaled, BACKGROUND)
    if not image.max() <= MAX_INTENSITY:
        raise ValueError("its highest intensities are orders of magnitude above the others: clip damaged voxels")
    return image


def choose_slices(split: str, seg: np.ndarray, usable: np.ndarray, test_slices: str = "largest") -> list[int]:
    """Return the sorted indices of the slices that go into `split`, among the usable ones.

    Args:
        split: "train" for all slices without tumour; "val" or "test" for those that `test_slices` names.
        seg: labels, [H, W, N]; tumour is > 0.
        usable: bool [N].
        test_slices: "largest" for the one with the largest tumour, if any (the first of equals); "all" for all.
    """
    tumour_area = (seg > 0).sum(axis=(0, 1))  # pixels
    if split == "train":
        return (usable & (tumour_area == 0)).nonzero()[0].tolist()
    if test_slices == "all":
        return usable.nonzero()[0].tolist()
    tumour_area[~usable] = 0
    return [int(tumour_area.argmax())] if tumour_area.any() else []
