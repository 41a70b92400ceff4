"""Voxel grids, and resampling volumes of any orientation and voxel size onto a common grid.

Where the axes are only permuted, flipped, cropped or padded, voxels are copied instead of interpolated, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.ndimage import affine_transform, label

TOLERANCE = 1e-3  # within which spacings (mm), direction cosines and voxel coordinates count as equal
MIN_VOXEL = 0.02  # mm; a header that declares a smaller voxel has another unit
MAX_LENGTH = 1000.0  # mm of a volume along any grid axis; a header that declares more is wrong and would exhaust memory


class SliceGeometry(NamedTuple):
    """Orientation, spacing and shape shared by all axial slices of a data set."""

    axcodes: str  # anatomical directions of a slice's two axes and of the slice order, e.g. "LPS", as in nibabel
    spacing: tuple[float, float, float]  # mm
    shape: tuple[int, int]  # px of a slice

    @classmethod
    def of_volume(cls, grid: VoxelGrid) -> SliceGeometry:
        """Return the geometry of a volume whose third axis is axial."""
        spacing = tuple(round(float(mm), 6) for mm in nibabel.affines.voxel_sizes(grid.affine))
        return cls("".join(aff2axcodes(grid.affine)), spacing, tuple(map(int, grid.shape[:2])))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SliceGeometry:
        """Return the geometry that `to_json` wrote as `record`.

        Raises:
            KeyError, TypeError, ValueError: if `record` has another form.
        """
        axcodes2ornt(record["axcodes"])  # raises for unknown letters
        (x, y, z), (height, width) = record["spacing"], record["shape"]
        return cls(record["axcodes"], (float(x), float(y), float(z)), (int(height), int(width)))

    def to_json(self) -> dict[str, Any]:
        """Return `{"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [240, 240]}`, for example."""
        return {"axcodes": self.axcodes, "spacing": list(self.spacing), "shape": list(self.shape)}


class VoxelGrid(NamedTuple):
    """Shape and position of a volume's voxels."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # [4, 4], from voxel index to mm


def place_grid(
    geometry: SliceGeometry, mask: np.ndarray, affine: np.ndarray, depth: int | None = None
) -> tuple[VoxelGrid, float]:
    """Return the grid on which a volume's slices have the given geometry.

    The grid's voxels coincide with the volume's if the spacing is the same and no axis is oblique. If the shape of the
    slices is the same, too, whatever the order and direction of the volume's axes, slices are kept as they are.
    Otherwise they are centred on the bounding box of the mask's largest connected component.

    Args:
        geometry: of the slices on the grid.
        mask: bool [I, J, K], the voxels of the volume that the grid should contain.
        affine: of the volume, [4, 4].
        depth: number of slices, centred on the same bounding box; None: as many as cover the volume.

    Returns:
        The grid [H, W, D], and the fraction of the mask's voxels, in [0, 1], that are outside it.

    Raises:
        ValueError: if the mask is empty, the affine is singular, or the volume's size is implausible.
    """
    if not mask.any():
        raise ValueError("every voxel is 0")
    if (sizes := nibabel.affines.voxel_sizes(affine)).max() < MIN_VOXEL:
        size = " × ".join(f"{mm:.2g}" for mm in sizes)
        raise ValueError(f"its affine makes its voxels {size} mm large, too small for a scan: use mm as the unit")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError("its affine is singular")
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(geometry.axcodes))
    turned = affine @ inv_ornt_aff(turn, mask.shape)  # with the volume's axes permuted and flipped like the geometry's
    turned_shape = tuple(int(mask.shape[axis]) for axis in np.argsort(turn[:, 0]))

    # Within the tolerance, use the volume's own axes, so that voxels coincide exactly.
    axes = _axis_steps(geometry)
    spacing = nibabel.affines.voxel_sizes(turned)
    same_spacing = np.abs(spacing - geometry.spacing).max() <= TOLERANCE
    fits = same_spacing and np.abs(turned[:3, :3] / spacing - axes / geometry.spacing).max() <= TOLERANCE
    axes = turned[:3, :3] if fits else axes

    # From voxel indices of the volume to steps along these axes from the turned volume's first voxel. The grid starts
    # at an integer step, so that even coarser voxels coincide with some of the grid's.
    steps = np.linalg.inv(nibabel.affines.from_matvec(axes, turned[:3, 3])) @ affine
    bottom, top = _bounds(steps, _corners(mask.shape))
    if (length := ((top - bottom) * geometry.spacing).max()) > MAX_LENGTH:
        raise ValueError(f"its affine makes it {length:.0f} mm long: use mm as the unit")
    parts, _ = label(mask)  # skull stripping leaves specks far from the brain
    low, high = _bounds(steps, np.argwhere(parts == np.bincount(parts[mask]).argmax()))
    keeps_slices = fits and turned_shape[:2] == geometry.shape
    first = [0 if keeps_slices else _window_start(low[i], high[i], geometry.shape[i]) for i in (0, 1)]
    if depth is None:
        first.append(int(np.floor(bottom[2] + TOLERANCE)))
        depth = int(np.ceil(top[2] - TOLERANCE)) - first[2] + 1
    else:
        first.append(_window_start(low[2], high[2], depth))
    shape, origin = (*geometry.shape, depth), turned[:3, 3] + axes @ first
    grid = VoxelGrid(shape, nibabel.affines.from_matvec(axes, origin))
    voxels = _apply(np.linalg.inv(grid.affine) @ affine, np.argwhere(mask))
    outside = (voxels < -0.5 - TOLERANCE) | (voxels > np.array(shape) - 0.5 + TOLERANCE)
    return grid, float(outside.any(axis=1).mean())


def resample(volume: np.ndarray, affine: np.ndarray, grid: VoxelGrid, order: int = 1) -> np.ndarray:
    """Return a volume's values at the voxels of a grid, 0 outside the volume.

    Args:
        volume: [I, J, K], of any real dtype or bool.
        affine: of the volume, [4, 4].
        grid: to resample onto.
        order: 1 for linear interpolation; 0 for the nearest voxel, for masks and labels.

    Returns:
        An array of the grid's shape: copied values in the volume's dtype if the voxels coincide (the volume itself if
        nothing changes); otherwise interpolated ones, float32 for order 1.
    """
    to_volume = np.linalg.inv(affine) @ grid.affine  # from the grid's voxel index to the volume's
    rounded = np.rint(to_volume)
    error = np.abs(_apply(to_volume - rounded, _corners(grid.shape))).max()
    sums = [np.abs(rounded[:3, :3]).sum(axis) for axis in (0, 1)]
    if error <= TOLERANCE and np.array_equal(sums, np.ones((2, 3))):  # axes are only permuted and flipped
        return _copy_voxels(volume, rounded, grid.shape)
    if order == 1:
        volume = volume.astype(np.float32, copy=False)
    numbers = volume.view(np.uint8) if volume.dtype == bool else volume
    matrix, offset = to_volume[:3, :3], to_volume[:3, 3]
    # "constant" returns 0 at coordinates of -1e-15; "grid-constant" interpolates between the border and zeros.
    moved = affine_transform(numbers, matrix, offset, grid.shape, order=order, mode="grid-constant")
    return moved.view(bool) if volume.dtype == bool else moved


def resample_intensities(volume: np.ndarray, affine: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """Resample intensities whose background is 0, without blurring edges into the background."""
    moved = resample(volume, affine, grid)
    if moved is volume:
        return volume
    return np.where(resample(volume != 0, affine, grid, order=0), moved, 0).astype(moved.dtype, copy=False)


def _axis_steps(geometry: SliceGeometry) -> np.ndarray:
    """Return one step along each axis in mm, as the columns of a [3, 3] matrix."""
    axes = np.zeros((3, 3))
    for i, (row, sign) in enumerate(axcodes2ornt(geometry.axcodes)):
        axes[int(row), i] = sign * geometry.spacing[i]
    return axes


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points [N, 3] by an affine or a difference of two."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _corners(shape: tuple[int, int, int]) -> np.ndarray:
    """Return the indices [8, 3] of a volume's corner voxels."""
    return np.array(list(itertools.product(*((0, length - 1) for length in shape))))


def _bounds(affine: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moved = _apply(affine, points)
    return moved.min(axis=0), moved.max(axis=0)


def _window_start(low: float, high: float, length: int) -> int:
    """Return the first index of a window of `length` voxels around the middle of low … high."""
    return int(np.floor((low + high - (length - 1)) / 2 + TOLERANCE))


def _copy_voxels(volume: np.ndarray, to_volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample a volume whose axes are only permuted, flipped, cropped or padded."""
    if shape == volume.shape and np.array_equal(to_volume, np.eye(4)):
        return volume
    axes = np.abs(to_volume[:3, :3]).argmax(axis=0)  # the volume's axis along each of the grid's
    turned = volume.transpose(axes)
    sources = [
        (to_volume[axis, i] * np.arange(shape[i]) + to_volume[axis, 3]).astype(int) for i, axis in enumerate(axes)
    ]
    inside = [(source >= 0) & (source < length) for source, length in zip(sources, turned.shape, strict=True)]
    moved = np.zeros(shape, dtype=volume.dtype)
    moved[np.ix_(*inside)] = turned[np.ix_(*(source[valid] for source, valid in zip(sources, inside, strict=True)))]
    return moved
