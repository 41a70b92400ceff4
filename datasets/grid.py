"""The grid that a data set's axial slices lie on; how scans of any orientation and voxel size come onto it and back.

Where voxels only change their order or their number, they are moved and not interpolated: what lies on the grid already
stays as it is, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy.ndimage import affine_transform, label

SAME = 1e-3  # how far spacings (mm), directions (cosines) and voxel centres (voxels) may be apart and count as one
TALLEST = 1000.0  # mm, of a scan: a header that says more is wrong, and would fill the memory


class TrainingGrid(NamedTuple):
    """What all axial slices of a data set share; by default that of BraTS."""

    axcodes: str = "LPS"  # where the axes of a slice and the slices themselves lead to, as nibabel names it
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    shape: tuple[int, int] = (240, 240)  # px of a slice

    @classmethod
    def of_volume(cls, affine: np.ndarray, shape: tuple[int, int, int]) -> TrainingGrid:
        """The grid that a volume [H, W, D] lies on, whose third axis is the axial one."""
        spacing = tuple(round(float(mm), 6) for mm in nibabel.affines.voxel_sizes(affine))
        return cls("".join(aff2axcodes(affine)), spacing, tuple(map(int, shape[:2])))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TrainingGrid:
        """What `to_json` made; a KeyError, TypeError or ValueError for anything else."""
        axcodes2ornt(record["axcodes"])  # refuses other letters
        (x, y, z), (height, width) = record["spacing"], record["shape"]
        return cls(record["axcodes"], (float(x), float(y), float(z)), (int(height), int(width)))

    def to_json(self) -> dict[str, Any]:
        """`{"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [240, 240]}`."""
        return {"axcodes": self.axcodes, "spacing": list(self.spacing), "shape": list(self.shape)}


class Field(NamedTuple):
    """Where the voxels of a volume lie."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # [4, 4], from voxel index to mm


def find_field(
    grid: TrainingGrid, brain: np.ndarray, affine: np.ndarray, depth: int | None = None
) -> tuple[Field, float]:
    """Where on the grid a scan is to lie.

    The axes follow the grid's, at its spacing. A scan with slices of the grid's shape keeps them, whatever the order
    and direction of its axes; of others a slice is the grid's shape around the middle of the brain's bounding box,
    isolated voxels left out. Where the spacing is the grid's and no axis is oblique, the new voxels are the old ones.

    Args:
        grid: of the training data.
        brain: bool [I, J, K], which voxels of the scan are brain.
        affine: of the scan, [4, 4].
        depth: slices wanted, around the middle of the brain's bounding box; None: as many as cover the scan.

    Returns:
        The field [H, W, D], and the share of the brain's voxels, in [0, 1], that lie outside it.

    Raises:
        ValueError: no brain, an affine that gives voxels no extent, or a scan taller than TALLEST.
    """
    if not brain.any():
        raise ValueError("every voxel is 0")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError("its affine gives its voxels no extent")
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(grid.axcodes))
    # Of the scan with its axes in the grid's order and direction.
    turned = affine @ inv_ornt_aff(turn, brain.shape)
    turned_shape = tuple(int(brain.shape[axis]) for axis in np.argsort(turn[:, 0]))

    # The axes of the field: the scan's own where they are as good as the grid's, so that the voxels are the same.
    axes = _axes(grid)
    directions = turned[:3, :3] / nibabel.affines.voxel_sizes(turned)
    spacing_differs = np.abs(nibabel.affines.voxel_sizes(turned) - grid.spacing).max() > SAME
    fits = not spacing_differs and np.abs(directions - axes / grid.spacing).max() <= SAME
    axes = turned[:3, :3] if fits else axes

    # From a voxel index of the scan to steps along these axes from the turned scan's first voxel. Steps are whole,
    # so that coarser voxels, too, meet some of the field's.
    steps = np.linalg.inv(nibabel.affines.from_matvec(axes, turned[:3, 3])) @ affine
    low, high = _bounds(steps, _ends_of_columns(_largest_part(brain)))
    keeps_slices = fits and turned_shape[:2] == grid.shape
    first = [0 if keeps_slices else _centred(low[i], high[i], grid.shape[i]) for i in (0, 1)]
    if depth is None:
        bottom, top = (end[2] for end in _bounds(steps, _corners(brain.shape)))
        if (top - bottom) * grid.spacing[2] > TALLEST:
            raise ValueError(f"its affine makes it {(top - bottom) * grid.spacing[2]:.0f} mm tall")
        first.append(int(np.floor(bottom + SAME)))
        depth = int(np.ceil(top - SAME)) - first[2] + 1
    else:
        first.append(_centred(low[2], high[2], depth))
    shape = (*grid.shape, depth)
    field = Field(shape, nibabel.affines.from_matvec(axes, turned[:3, 3] + axes @ first))
    return field, _share_outside(brain, affine, field)


def move(volume: np.ndarray, affine: np.ndarray, field: Field, order: int = 1) -> np.ndarray:
    """A volume's values at the voxels of a field, 0 beyond the volume.

    Args:
        volume: [I, J, K], of any real dtype or bool.
        affine: of the volume, [4, 4].
        field: where the values are wanted.
        order: 1 interpolates linearly, 0 takes the nearest voxel, for masks and labels.

    Returns:
        An array of the field's shape. Where its voxels coincide with the volume's, the values are those of the volume,
        in its dtype (the volume itself, if nothing changes); otherwise they are float32 for order 1.
    """
    to_volume = np.linalg.inv(affine) @ field.affine  # from the field's voxel index to the volume's
    whole = np.rint(to_volume)
    error = np.abs(_apply(to_volume - whole, _corners(field.shape))).max()
    sums = [np.abs(whole[:3, :3]).sum(axis) for axis in (0, 1)]
    if error <= SAME and np.array_equal(sums, np.ones((2, 3))):  # axes are only exchanged and turned round
        return _move_whole_voxels(volume, whole, field.shape)
    if order == 1:
        volume = volume.astype(np.float32, copy=False)
    # "constant" would put 0 at coordinates of -1e-15; "grid-constant" knows only values and zeros around them.
    as_number = volume.view(np.uint8) if volume.dtype == bool else volume
    moved = affine_transform(
        as_number, to_volume[:3, :3], to_volume[:3, 3], field.shape, order=order, mode="grid-constant"
    )
    return moved.view(bool) if volume.dtype == bool else moved


def move_scan(volume: np.ndarray, affine: np.ndarray, field: Field) -> np.ndarray:
    """As `move` for intensities whose background is 0: a voxel is brain or 0, and no edge is smeared into it."""
    moved = move(volume, affine, field)
    if moved is volume:
        return volume
    return np.where(move(volume != 0, affine, field, order=0), moved, 0).astype(moved.dtype, copy=False)


def _axes(grid: TrainingGrid) -> np.ndarray:
    """One step along each axis of the grid in mm, the columns of [3, 3]."""
    axes = np.zeros((3, 3))
    for i, (row, sign) in enumerate(axcodes2ornt(grid.axcodes)):
        axes[int(row), i] = sign * grid.spacing[i]
    return axes


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [N, 3] through an affine or a difference of two."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _corners(shape: tuple[int, int, int]) -> np.ndarray:
    """The indices [8, 3] of a volume's corner voxels."""
    return np.array(list(itertools.product(*((0, length - 1) for length in shape))))


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest part that hangs together: skull stripping leaves specks behind, far from the brain."""
    parts, _ = label(mask)
    return parts == np.bincount(parts[mask]).argmax()


def _ends_of_columns(mask: np.ndarray) -> np.ndarray:
    """The indices [N, 3] of the first and last voxel of the mask along the third axis: no others lie further out."""
    i, j = np.nonzero(mask.any(axis=2))
    columns = mask[i, j]
    last = mask.shape[2] - 1 - columns[:, ::-1].argmax(axis=1)
    return np.concatenate([np.stack([i, j, k], axis=1) for k in (columns.argmax(axis=1), last)])


def _bounds(affine: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved = _apply(affine, points)
    return moved.min(axis=0), moved.max(axis=0)


def _centred(low: float, high: float, length: int) -> int:
    """Where a window of so many voxels begins around the middle of low … high."""
    return int(np.floor((low + high - (length - 1)) / 2 + SAME))


def _share_outside(brain: np.ndarray, affine: np.ndarray, field: Field) -> float:
    to_field = np.linalg.inv(field.affine) @ affine
    low, high = -0.5 - SAME, np.array(field.shape) - 0.5 + SAME
    corners = _apply(to_field, _corners(brain.shape))
    if (corners >= low).all() and (corners <= high).all():  # of most scans there is nothing to count
        return 0.0
    voxels = _apply(to_field, np.argwhere(brain))
    return float(((voxels < low) | (voxels > high)).any(axis=1).mean())


def _move_whole_voxels(volume: np.ndarray, to_volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`move` where the field's voxels are the volume's: axes in another order, turned round, cropped or padded."""
    turn = io_orientation(np.linalg.inv(to_volume))
    turned = apply_orientation(volume, turn)
    begin = np.rint((np.linalg.inv(inv_ornt_aff(turn, volume.shape)) @ to_volume)[:3, 3]).astype(int)
    if not begin.any() and turned.shape == shape and np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]):
        return volume
    moved = np.zeros(shape, dtype=volume.dtype)
    there, here = [], []
    for start, length, available in zip(begin, shape, turned.shape, strict=True):
        first, stop = max(0, -start), max(0, -start, min(length, available - start))
        here.append(slice(first, stop))
        there.append(slice(first + start, stop + start))
    moved[tuple(here)] = turned[tuple(there)]
    return moved
