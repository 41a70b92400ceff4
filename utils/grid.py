"""Where the voxels of a volume lie, and how volumes of any orientation and voxel size come onto a common grid.

Where voxels only change their order or their number, they are moved and not interpolated: what lies on the grid already
stays as it is, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.ndimage import affine_transform, label

SAME = 1e-3  # how far spacings (mm), directions (cosines) and voxel centres (voxels) may be apart and count as one
LONGEST = (
    1000.0  # mm, of a volume along any axis of the slices: a header that says more is wrong, and would fill the memory
)


class SliceGeometry(NamedTuple):
    """What all axial slices of a data set share, wherever each of its volumes lies."""

    axcodes: str  # where the axes of a slice and the slices themselves lead to, "LPS" for example, as in nibabel
    spacing: tuple[float, float, float]  # mm
    shape: tuple[int, int]  # px of a slice

    @classmethod
    def of_volume(cls, grid: VoxelGrid) -> SliceGeometry:
        """The geometry of a volume whose third axis is the axial one."""
        spacing = tuple(round(float(mm), 6) for mm in nibabel.affines.voxel_sizes(grid.affine))
        return cls("".join(aff2axcodes(grid.affine)), spacing, tuple(map(int, grid.shape[:2])))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SliceGeometry:
        """What `to_json` made; a KeyError, TypeError or ValueError for anything else."""
        axcodes2ornt(record["axcodes"])  # refuses other letters
        (x, y, z), (height, width) = record["spacing"], record["shape"]
        return cls(record["axcodes"], (float(x), float(y), float(z)), (int(height), int(width)))

    def to_json(self) -> dict[str, Any]:
        """`{"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [240, 240]}`, for example."""
        return {"axcodes": self.axcodes, "spacing": list(self.spacing), "shape": list(self.shape)}


class VoxelGrid(NamedTuple):
    """Where the voxels of a volume lie."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # [4, 4], from voxel index to mm


def place_grid(
    geometry: SliceGeometry, mask: np.ndarray, affine: np.ndarray, depth: int | None = None
) -> tuple[VoxelGrid, float]:
    """Where a volume is to lie so that its slices have the given geometry.

    The axes follow the geometry's, at its spacing. A volume whose slices have that shape keeps them, whatever the
    order and direction of its axes; of others a slice is taken around the middle of the mask's bounding box, isolated
    voxels left out. Where the spacing is the same and no axis is oblique, the new voxels are the old ones.

    Args:
        geometry: of the slices that are wanted.
        mask: bool [I, J, K], which voxels of the volume matter.
        affine: of the volume, [4, 4].
        depth: slices wanted, around the middle of the mask's bounding box; None: as many as cover the volume.

    Returns:
        The grid [H, W, D], and the share of the mask's voxels, in [0, 1], that lie outside it.

    A ValueError for an empty mask, an affine that gives voxels no extent, or a volume longer than LONGEST.
    """
    if not mask.any():
        raise ValueError("every voxel is 0")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError("its affine gives its voxels no extent")
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(geometry.axcodes))
    # Of the volume with its axes in the geometry's order and direction.
    turned = affine @ inv_ornt_aff(turn, mask.shape)
    turned_shape = tuple(int(mask.shape[axis]) for axis in np.argsort(turn[:, 0]))

    # The volume's own axes where they are as good as the geometry's, so that the voxels are the same.
    axes = _axes(geometry)
    directions = turned[:3, :3] / nibabel.affines.voxel_sizes(turned)
    spacing_differs = np.abs(nibabel.affines.voxel_sizes(turned) - geometry.spacing).max() > SAME
    fits = not spacing_differs and np.abs(directions - axes / geometry.spacing).max() <= SAME
    axes = turned[:3, :3] if fits else axes

    # From a voxel index of the volume to steps along these axes from the turned volume's first voxel. Steps are
    # whole, so that coarser voxels, too, meet some of the grid's.
    steps = np.linalg.inv(nibabel.affines.from_matvec(axes, turned[:3, 3])) @ affine
    bottom, top = _bounds(steps, _corners(mask.shape))
    if (length := ((top - bottom) * geometry.spacing).max()) > LONGEST:
        raise ValueError(f"its affine makes it {length:.0f} mm long")
    parts, _ = label(mask)  # skull stripping leaves specks behind, far from the brain
    low, high = _bounds(steps, np.argwhere(parts == np.bincount(parts[mask]).argmax()))
    keeps_slices = fits and turned_shape[:2] == geometry.shape
    first = [0 if keeps_slices else _centred(low[i], high[i], geometry.shape[i]) for i in (0, 1)]
    if depth is None:
        first.append(int(np.floor(bottom[2] + SAME)))
        depth = int(np.ceil(top[2] - SAME)) - first[2] + 1
    else:
        first.append(_centred(low[2], high[2], depth))
    shape, origin = (*geometry.shape, depth), turned[:3, 3] + axes @ first
    grid = VoxelGrid(shape, nibabel.affines.from_matvec(axes, origin))
    voxels = _apply(np.linalg.inv(grid.affine) @ affine, np.argwhere(mask))
    outside = (voxels < -0.5 - SAME) | (voxels > np.array(shape) - 0.5 + SAME)
    return grid, float(outside.any(axis=1).mean())


def resample(volume: np.ndarray, affine: np.ndarray, grid: VoxelGrid, order: int = 1) -> np.ndarray:
    """A volume's values at the voxels of a grid, 0 beyond the volume.

    Args:
        volume: [I, J, K], of any real dtype or bool.
        affine: of the volume, [4, 4].
        grid: where the values are wanted.
        order: 1 interpolates linearly, 0 takes the nearest voxel, for masks and labels.

    Returns:
        An array of the grid's shape. Where its voxels coincide with the volume's, the values are those of the volume,
        in its dtype (the volume itself, if nothing changes); otherwise they are float32 for order 1.
    """
    to_volume = np.linalg.inv(affine) @ grid.affine  # from the grid's voxel index to the volume's
    whole = np.rint(to_volume)
    error = np.abs(_apply(to_volume - whole, _corners(grid.shape))).max()
    sums = [np.abs(whole[:3, :3]).sum(axis) for axis in (0, 1)]
    if error <= SAME and np.array_equal(sums, np.ones((2, 3))):  # axes are only exchanged and turned round
        return _move_whole_voxels(volume, whole, grid.shape)
    if order == 1:
        volume = volume.astype(np.float32, copy=False)
    # "constant" would put 0 at coordinates of -1e-15; "grid-constant" knows only values and zeros around them.
    as_number = volume.view(np.uint8) if volume.dtype == bool else volume
    moved = affine_transform(
        as_number, to_volume[:3, :3], to_volume[:3, 3], grid.shape, order=order, mode="grid-constant"
    )
    return moved.view(bool) if volume.dtype == bool else moved


def resample_intensities(volume: np.ndarray, affine: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """As `resample` for intensities whose background is 0, so that no edge is smeared into the background."""
    moved = resample(volume, affine, grid)
    if moved is volume:
        return volume
    return np.where(resample(volume != 0, affine, grid, order=0), moved, 0).astype(moved.dtype, copy=False)


def _axes(geometry: SliceGeometry) -> np.ndarray:
    """One step along each axis in mm, the columns of [3, 3]."""
    axes = np.zeros((3, 3))
    for i, (row, sign) in enumerate(axcodes2ornt(geometry.axcodes)):
        axes[int(row), i] = sign * geometry.spacing[i]
    return axes


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [N, 3] through an affine or a difference of two."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _corners(shape: tuple[int, int, int]) -> np.ndarray:
    """The indices [8, 3] of a volume's corner voxels."""
    return np.array(list(itertools.product(*((0, length - 1) for length in shape))))


def _bounds(affine: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved = _apply(affine, points)
    return moved.min(axis=0), moved.max(axis=0)


def _centred(low: float, high: float, length: int) -> int:
    """Where a window of so many voxels begins around the middle of low … high."""
    return int(np.floor((low + high - (length - 1)) / 2 + SAME))


def _move_whole_voxels(volume: np.ndarray, to_volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`resample` where the grid's voxels are the volume's: axes in another order, turned round, cropped or padded."""
    if shape == volume.shape and np.array_equal(to_volume, np.eye(4)):
        return volume
    axes = np.abs(to_volume[:3, :3]).argmax(axis=0)  # the volume's axis along each of the grid's
    turned = volume.transpose(axes)
    places = [
        (to_volume[axis, i] * np.arange(shape[i]) + to_volume[axis, 3]).astype(int) for i, axis in enumerate(axes)
    ]
    there = [(place >= 0) & (place < length) for place, length in zip(places, turned.shape, strict=True)]
    moved = np.zeros(shape, dtype=volume.dtype)
    moved[np.ix_(*there)] = turned[np.ix_(*(place[inside] for place, inside in zip(places, there, strict=True)))]
    return moved
