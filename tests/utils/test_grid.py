"""Resampling of scans of any orientation and voxel size onto the training grid and back."""

import itertools

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from utils.grid import TOLERANCE, SliceGeometry, VoxelGrid, place_grid, resample, resample_intensities

SHAPE = (48, 44, 31)
BRATS = SliceGeometry("LPS", (1.0, 1.0, 1.0), (240, 240))
GEOMETRY = BRATS._replace(shape=SHAPE[:2])
LPS = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 15], [0, 0, 1, -12], [0, 0, 0, 1]])
CENTRE = apply_affine(LPS, (np.array(SHAPE) - 1) / 2)  # of all scans here, mm
BLOB = CENTRE + np.array([6, -5, 4])  # mm

ORIENTATIONS = [
    "".join(signs) for axes in itertools.permutations(("LR", "AP", "SI")) for signs in itertools.product(*axes)
]


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """A textured brain on the grid, with some negative voxels and an off-centre bright blob; int16."""
    return sample(SHAPE, LPS).astype(np.int16)


def sample(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Sample the same head on any grid: an ellipsoid that is not symmetric under flips or swaps of axes."""
    position = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    offset = position - CENTRE
    brain = ((offset / [17, 19, 12]) ** 2).sum(-1) < 1
    texture = 300 + 6 * offset[..., 0] + 4 * offset[..., 1] - 9 * offset[..., 2] + 100 * np.sin(position).sum(-1)
    texture[np.linalg.norm(position - BLOB, axis=-1) < 3.2] = 4000
    return np.where(brain, np.where(np.abs(texture) < 1, 1, texture), 0)


def centre_of_blob(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the blob's centre in mm."""
    return apply_affine(affine, np.argwhere(volume > 2000).mean(axis=0))


def reoriented(volume: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the same voxels in another orientation, and their affine."""
    image = nibabel.Nifti1Image(volume, affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axcodes))
    turned = image.as_reoriented(turn)
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axcodes
    np.testing.assert_allclose(turned.affine, affine @ inv_ornt_aff(turn, volume.shape))
    return np.asarray(turned.dataobj), turned.affine


def rotation(degrees: float, axis: int) -> np.ndarray:
    i, j = [other for other in range(3) if other != axis]
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def head(axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan of the whole head with the columns of `axes` as voxel axes in mm, and its affine."""
    shape = tuple(int(n) for n in np.ceil(56 / np.linalg.norm(axes, axis=0)))
    affine = from_matvec(axes, CENTRE - axes @ ((np.array(shape) - 1) / 2))
    return sample(shape, affine), affine


OTHER_GEOMETRIES = {
    "2 mm": np.diag([-2.0, -2.0, 2.0]),
    "2 mm, turned round": np.diag([2.0, 2.0, -2.0]),
    "thick slices": np.diag([-0.8, -0.8, 3.0]),
    "sagittal, anisotropic": np.array([[0, 0, 1.2], [-0.9, 0, 0], [0, 0.9, 0]]),
    "oblique": rotation(9, 0) @ rotation(-6, 2) @ np.diag([-1.0, -1.0, 1.0]),
    "oblique, coronal, anisotropic": rotation(7, 1) @ np.array([[1.1, 0, 0], [0, 0, 1.5], [0, -0.9, 0]]),
}


# ----------------------------------------------------------------------------------------------------------
# The grid


def test_brats_is_the_default():
    brats = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert SliceGeometry.of_volume(VoxelGrid((240, 240, 155), brats)) == BRATS


def test_json_round_trip():
    grid = SliceGeometry("RAS", (0.9, 0.9, 1.2), (192, 256))
    record = grid.to_json()
    assert record == {"axcodes": "RAS", "spacing": [0.9, 0.9, 1.2], "shape": [192, 256]}
    assert SliceGeometry.from_json(record) == grid


@pytest.mark.parametrize(
    "change", [{"axcodes": "LPQ"}, {"spacing": [1.0, 1.0]}, {"shape": 240}, {"spacing": ["wide", 1, 1]}]
)
def test_invalid_geometries_are_refused(change):
    with pytest.raises((KeyError, TypeError, ValueError)):
        SliceGeometry.from_json(BRATS.to_json() | change)


# ----------------------------------------------------------------------------------------------------------
# Exact cases


@pytest.mark.parametrize("depth", [None, SHAPE[2]])
def test_a_scan_on_the_grid_is_unchanged(scan, depth):
    affine = LPS.copy()
    affine[0, 1], affine[2, 2] = 2e-4, 1 + 4e-4  # rounding errors, as in headers
    field, cut = place_grid(GEOMETRY, scan != 0, affine, depth)
    assert cut == 0
    assert field.shape == SHAPE
    np.testing.assert_array_equal(field.affine, affine)
    for moved in (resample(scan, affine, field), resample_intensities(scan, affine, field)):
        assert moved is scan


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_permuted_and_flipped_axes_round_trip_exactly(scan, axcodes):
    volume, affine = reoriented(scan, LPS, axcodes)
    field, cut = place_grid(GEOMETRY, volume != 0, affine)
    assert cut == 0
    np.testing.assert_allclose(field.affine, LPS, atol=1e-9)
    for order in (0, 1):
        moved = resample(volume, affine, field, order)
        np.testing.assert_array_equal(moved, scan)
        assert moved.dtype == scan.dtype
    np.testing.assert_array_equal(resample_intensities(volume, affine, field), scan)
    np.testing.assert_array_equal(resample(scan, field.affine, VoxelGrid(volume.shape, affine)), volume)


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "PIR"])
def test_padding_and_cropping_are_exact(scan, axcodes):
    """Voxels of a scan that is smaller or larger than the grid are recovered exactly."""
    box = (slice(2, 46), slice(1, 43), slice(3, 29))
    cropped = scan[box]
    padded = np.pad(cropped, ((9, 3), (0, 17), (5, 0)))
    for inner, start in ((cropped, (2, 1, 3)), (padded, (-7, 1, -2))):
        affine = LPS @ from_matvec(np.eye(3), start)
        volume, affine = reoriented(inner, affine, axcodes)
        field, cut = place_grid(GEOMETRY, volume != 0, affine)
        assert cut == 0
        assert field.shape[:2] == GEOMETRY.shape
        moved = resample(volume, affine, field)
        assert moved.dtype == scan.dtype
        assert np.count_nonzero(moved) == np.count_nonzero(scan)
        offset = np.linalg.inv(LPS) @ field.affine
        np.testing.assert_allclose(offset[:3, :3], np.eye(3), atol=1e-9)
        np.testing.assert_allclose(offset[:3, 3], np.rint(offset[:3, 3]), atol=1e-9)
        low, high = (end(np.argwhere(moved), axis=0)[:2] for end in (np.min, np.max))
        assert np.abs((low + high) - (np.array(GEOMETRY.shape) - 1)).max() <= 1  # centred in the slice
        brain = volume != 0
        back = resample(moved, field.affine, VoxelGrid(volume.shape, affine))
        np.testing.assert_array_equal(back[brain], volume[brain])


def test_rounding_does_not_lose_border_voxels():
    """Rounding can put border voxels at -1e-15, where interpolation that ends at the border returns 0."""
    volume = np.full((6, 6, 6), 5, np.float32)
    affine = from_matvec(rotation(1e-9, 2), [0.1, 0.2, 0.3])
    field = VoxelGrid((3, 3, 3), affine @ from_matvec(2 * np.eye(3), [-1e-14, 1e-14, 0]))
    np.testing.assert_allclose(resample(volume, affine, field), 5)
    assert (resample(volume != 0, affine, field, order=0)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.dtype(">i2"), np.float64, bool])
def test_dtypes(scan, dtype):
    """Labels keep their dtype; interpolated intensities become float32."""
    labels = np.clip(scan, 0, 1).astype(dtype)
    coarse = VoxelGrid((24, 22, 16), LPS @ np.diag([2.0, 2, 2, 1]))
    np.testing.assert_array_equal(resample(labels, LPS, coarse, 0), labels[::2, ::2, ::2])
    if dtype is not bool:
        between = VoxelGrid(SHAPE, LPS @ from_matvec(np.eye(3), [0.5, 0, 0]))
        moved = resample(labels, LPS, between)
        assert moved.dtype == np.float32
        np.testing.assert_allclose(moved[:-1], (labels[:-1].astype(float) + labels[1:]) / 2, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Interpolation


@pytest.mark.parametrize("name", OTHER_GEOMETRIES)
def test_positions_in_mm_are_preserved(name):
    volume, affine = head(OTHER_GEOMETRIES[name])
    field, cut = place_grid(GEOMETRY, volume != 0, affine)
    assert cut == 0
    assert "".join(nibabel.aff2axcodes(field.affine)) == "LPS"
    np.testing.assert_allclose(np.abs(field.affine[:3, :3]), np.eye(3), atol=1e-12)
    moved = resample_intensities(volume, affine, field)
    voxel = max(1, *np.linalg.norm(OTHER_GEOMETRIES[name], axis=0))
    assert np.linalg.norm(centre_of_blob(moved, field.affine) - BLOB) < voxel / 2
    # the brain's volume is preserved
    litres = [np.count_nonzero(v) * abs(np.linalg.det(a[:3, :3])) for v, a in ((volume, affine), (moved, field.affine))]
    assert litres[1] == pytest.approx(litres[0], rel=0.05)
    # resample the interpolated volume back
    back = resample(moved, field.affine, VoxelGrid(volume.shape, affine))
    assert back.shape == volume.shape
    assert np.linalg.norm(centre_of_blob(back, affine) - BLOB) < voxel / 2


def test_modalities_on_different_grids_align_on_one_field(scan):
    coarse, affine = head(OTHER_GEOMETRIES["oblique, coronal, anisotropic"])
    field, _ = place_grid(GEOMETRY, scan != 0, LPS)
    moved = resample_intensities(coarse, affine, field)
    assert moved.shape == scan.shape
    inside = (scan != 0) & (moved != 0)
    assert np.corrcoef(moved[inside], scan[inside])[0, 1] > 0.9
    assert np.count_nonzero(inside) > 0.9 * np.count_nonzero(scan)


def test_edges_are_not_blurred_into_the_background():
    volume, affine = head(OTHER_GEOMETRIES["2 mm"])
    volume = np.where(volume != 0, 100, 0)
    field, _ = place_grid(GEOMETRY, volume != 0, affine)
    moved = resample_intensities(volume, affine, field)
    np.testing.assert_array_equal(moved != 0, resample(volume != 0, affine, field, order=0))
    assert np.count_nonzero(resample(volume, affine, field)) > np.count_nonzero(moved)


def test_coarse_voxels_round_trip():
    """Positions on both grids keep their values there and back."""
    volume, affine = head(OTHER_GEOMETRIES["2 mm, turned round"])
    field, _ = place_grid(GEOMETRY, volume != 0, affine)
    back = resample(resample(volume, affine, field), field.affine, VoxelGrid(volume.shape, affine))
    brain = volume != 0
    np.testing.assert_allclose(back[brain], volume[brain], rtol=1e-5)


def test_a_grid_of_another_direction_and_spacing(scan):
    grid = SliceGeometry("RAS", (1.5, 1.5, 2.0), (40, 36))
    field, cut = place_grid(grid, scan != 0, LPS)
    assert cut == 0
    assert SliceGeometry.of_volume(field) == grid
    moved = resample_intensities(scan, LPS, field)
    assert np.linalg.norm(centre_of_blob(moved, field.affine) - BLOB) < 1


# ----------------------------------------------------------------------------------------------------------
# Extent


def test_default_depth_covers_every_slice_of_the_scan():
    volume, affine = head(OTHER_GEOMETRIES["thick slices"])
    field, _ = place_grid(GEOMETRY, volume != 0, affine)
    assert field.shape[2] == 3 * (volume.shape[2] - 1) + 1
    positions = apply_affine(np.linalg.inv(field.affine) @ affine, [[0, 0, 0], [0, 0, volume.shape[2] - 1]])
    np.testing.assert_allclose(positions[:, 2], [0, field.shape[2] - 1], atol=TOLERANCE)


def test_a_fixed_depth_is_centred_on_the_brain(scan):
    shifted = np.concatenate([np.zeros((*SHAPE[:2], 10), scan.dtype), scan, scan[..., :3] * 0], axis=2)
    fields = []
    for volume, affine in ((scan, LPS), (shifted, LPS @ from_matvec(np.eye(3), [0, 0, -10]))):
        field, cut = place_grid(GEOMETRY, volume != 0, affine, depth=39)
        assert cut == 0
        assert field.shape == (*GEOMETRY.shape, 39)
        slices = np.flatnonzero(resample(volume, affine, field).any(axis=(0, 1)))
        assert abs(slices[0] - (38 - slices[-1])) <= 1
        fields.append(field)
    np.testing.assert_allclose(fields[0].affine, fields[1].affine)  # the same head, the same slice numbers


def test_specks_left_by_skull_stripping_do_not_move_the_field(scan):
    speckled = np.pad(scan, ((0, 0), (60, 0), (30, 0)))
    speckled[3, 2, 1] = speckled[40, 5, 2] = 7
    affine = LPS @ from_matvec(np.eye(3), [0, -60, -30])
    bare = np.where(np.indices(speckled.shape)[1] < 60, 0, speckled)
    fields = [place_grid(GEOMETRY, volume != 0, affine, depth=39) for volume in (bare, speckled)]
    np.testing.assert_array_equal(fields[0][0].affine, fields[1][0].affine)
    assert fields[0][1] == 0
    assert fields[1][1] == pytest.approx(2 / np.count_nonzero(speckled))


def test_share_lost_of_a_brain_that_does_not_fit(scan):
    brain = scan != 0
    narrow = BRATS._replace(shape=(48, 20))
    field, cut = place_grid(narrow, brain, LPS)
    kept = np.count_nonzero(resample(brain, LPS, field))
    assert cut == pytest.approx(1 - kept / np.count_nonzero(brain))
    assert 0.2 < cut < 0.8
    _, cut = place_grid(GEOMETRY, brain, LPS, depth=11)
    low = np.flatnonzero(brain.any(axis=(0, 1)))[0]
    high = np.flatnonzero(brain.any(axis=(0, 1)))[-1]
    middle = (low + high) // 2
    assert cut == pytest.approx(
        1 - np.count_nonzero(brain[..., middle - 5 : middle + 6]) / np.count_nonzero(brain), abs=0.01
    )


@pytest.mark.parametrize(
    ("brain", "affine", "message"),
    [
        (np.zeros((4, 4, 4), bool), LPS, "every voxel is 0"),
        (np.ones((4, 4, 4), bool), np.diag([1.0, 0, 1, 1]), "is singular"),
        (
            np.ones((4, 4, 4), bool),
            np.diag([0.001, 0.001, 0.003, 1]),
            "voxels 0.001 × 0.001 × 0.003 mm large, too small",
        ),
        (np.ones((4, 4, 400), bool), np.diag([1.0, 1, 90, 1]), "35910 mm long: use mm as the unit"),
        (np.ones((4, 4, 4), bool), nibabel.affines.from_matvec([[4, -1e5, 0], [0, 4, 0], [0, 0, 4]]), "300012 mm long"),
    ],
)
def test_invalid_brains_and_affines_are_refused(brain, affine, message):
    with pytest.raises(ValueError, match=message):
        place_grid(GEOMETRY, brain, affine)
