"""Scans of any orientation and voxel size on the grid of the training data, and back: exact wherever it can be."""

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
    """A brain with texture, some voxels below 0 and a bright blob off its middle, on the grid; int16."""
    return sample(SHAPE, LPS).astype(np.int16)


def sample(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """The same head wherever its voxels lie: an ellipsoid that no flip or exchange of axes leaves as it is."""
    place = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    away = place - CENTRE
    brain = ((away / [17, 19, 12]) ** 2).sum(-1) < 1
    texture = 300 + 6 * away[..., 0] + 4 * away[..., 1] - 9 * away[..., 2] + 100 * np.sin(place).sum(-1)
    texture[np.linalg.norm(place - BLOB, axis=-1) < 3.2] = 4000
    return np.where(brain, np.where(np.abs(texture) < 1, 1, texture), 0)


def centre_of_blob(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """In mm."""
    return apply_affine(affine, np.argwhere(volume > 2000).mean(axis=0))


def reoriented(volume: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in another order of axes, and their affine."""
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
    """A scan whose axes are the columns of [3, 3] in mm, large enough for the whole head, and its affine."""
    shape = tuple(int(n) for n in np.ceil(56 / np.linalg.norm(axes, axis=0)))
    affine = from_matvec(axes, CENTRE - axes @ ((np.array(shape) - 1) / 2))
    return sample(shape, affine), affine


OTHER_GEOMETRYS = {
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


def test_a_grid_survives_json():
    grid = SliceGeometry("RAS", (0.9, 0.9, 1.2), (192, 256))
    record = grid.to_json()
    assert record == {"axcodes": "RAS", "spacing": [0.9, 0.9, 1.2], "shape": [192, 256]}
    assert SliceGeometry.from_json(record) == grid


@pytest.mark.parametrize(
    "change", [{"axcodes": "LPQ"}, {"spacing": [1.0, 1.0]}, {"shape": 240}, {"spacing": ["wide", 1, 1]}]
)
def test_what_is_no_grid_is_refused(change):
    with pytest.raises((KeyError, TypeError, ValueError)):
        SliceGeometry.from_json(BRATS.to_json() | change)


# ----------------------------------------------------------------------------------------------------------
# What must be exact


@pytest.mark.parametrize("depth", [None, SHAPE[2]])
def test_a_scan_on_the_grid_stays_as_it_is(scan, depth):
    affine = LPS.copy()
    affine[0, 1], affine[2, 2] = 2e-4, 1 + 4e-4  # as headers have it, in single precision
    field, cut = place_grid(GEOMETRY, scan != 0, affine, depth)
    assert cut == 0
    assert field.shape == SHAPE
    np.testing.assert_array_equal(field.affine, affine)
    for moved in (resample(scan, affine, field), resample_intensities(scan, affine, field)):
        assert moved is scan


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_axes_in_another_order_or_direction_are_moved_exactly_and_back(scan, axcodes):
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
def test_padding_and_cropping_is_exact(scan, axcodes):
    """The scan in a smaller and in a larger box than the grid's: its voxels are found again, one by one."""
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
        assert np.abs((low + high) - (np.array(GEOMETRY.shape) - 1)).max() <= 1  # in the middle of the slice
        brain = volume != 0
        back = resample(moved, field.affine, VoxelGrid(volume.shape, affine))
        np.testing.assert_array_equal(back[brain], volume[brain])


def test_coordinates_a_hair_outside_keep_the_border():
    """Rounding puts the border's voxels at -1e-15, where an interpolation that stops at the border has zeros."""
    volume = np.full((6, 6, 6), 5, np.float32)
    affine = from_matvec(rotation(1e-9, 2), [0.1, 0.2, 0.3])
    field = VoxelGrid((3, 3, 3), affine @ from_matvec(2 * np.eye(3), [-1e-14, 1e-14, 0]))
    np.testing.assert_allclose(resample(volume, affine, field), 5)
    assert (resample(volume != 0, affine, field, order=0)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.dtype(">i2"), np.float64, bool])
def test_every_dtype_is_moved(scan, dtype):
    """Labels keep theirs; intensities that are interpolated become float32."""
    labels = np.clip(scan, 0, 1).astype(dtype)
    coarse = VoxelGrid((24, 22, 16), LPS @ np.diag([2.0, 2, 2, 1]))
    np.testing.assert_array_equal(resample(labels, LPS, coarse, 0), labels[::2, ::2, ::2])
    if dtype is not bool:
        between = VoxelGrid(SHAPE, LPS @ from_matvec(np.eye(3), [0.5, 0, 0]))
        moved = resample(labels, LPS, between)
        assert moved.dtype == np.float32
        np.testing.assert_allclose(moved[:-1], (labels[:-1].astype(float) + labels[1:]) / 2, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# What is interpolated


@pytest.mark.parametrize("name", OTHER_GEOMETRYS)
def test_a_place_in_the_head_stays_where_it_is(name):
    volume, affine = head(OTHER_GEOMETRYS[name])
    field, cut = place_grid(GEOMETRY, volume != 0, affine)
    assert cut == 0
    assert "".join(nibabel.aff2axcodes(field.affine)) == "LPS"
    np.testing.assert_allclose(np.abs(field.affine[:3, :3]), np.eye(3), atol=1e-12)
    moved = resample_intensities(volume, affine, field)
    voxel = max(1, *np.linalg.norm(OTHER_GEOMETRYS[name], axis=0))
    assert np.linalg.norm(centre_of_blob(moved, field.affine) - BLOB) < voxel / 2
    # all of the brain is there, and what is there is what lies at that place in the head
    litres = [np.count_nonzero(v) * abs(np.linalg.det(a[:3, :3])) for v, a in ((volume, affine), (moved, field.affine))]
    assert litres[1] == pytest.approx(litres[0], rel=0.05)
    # the way back, over what was interpolated
    back = resample(moved, field.affine, VoxelGrid(volume.shape, affine))
    assert back.shape == volume.shape
    assert np.linalg.norm(centre_of_blob(back, affine) - BLOB) < voxel / 2


def test_two_modalities_of_two_grids_meet_on_one_field(scan):
    coarse, affine = head(OTHER_GEOMETRYS["oblique, coronal, anisotropic"])
    field, _ = place_grid(GEOMETRY, scan != 0, LPS)
    moved = resample_intensities(coarse, affine, field)
    assert moved.shape == scan.shape
    inside = (scan != 0) & (moved != 0)
    assert np.corrcoef(moved[inside], scan[inside])[0, 1] > 0.9
    assert np.count_nonzero(inside) > 0.9 * np.count_nonzero(scan)


def test_no_edge_is_smeared_into_the_background():
    volume, affine = head(OTHER_GEOMETRYS["2 mm"])
    volume = np.where(volume != 0, 100, 0)
    field, _ = place_grid(GEOMETRY, volume != 0, affine)
    moved = resample_intensities(volume, affine, field)
    np.testing.assert_array_equal(moved != 0, resample(volume != 0, affine, field, order=0))
    assert np.count_nonzero(resample(volume, affine, field)) > np.count_nonzero(moved)


def test_coarse_voxels_are_met_by_fine_ones():
    """What is carried there and back at a place that both have is the same value."""
    volume, affine = head(OTHER_GEOMETRYS["2 mm, turned round"])
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
# How much there is


def test_by_default_every_slice_of_the_scan_has_one():
    volume, affine = head(OTHER_GEOMETRYS["thick slices"])
    field, _ = place_grid(GEOMETRY, volume != 0, affine)
    assert field.shape[2] == 3 * (volume.shape[2] - 1) + 1
    places = apply_affine(np.linalg.inv(field.affine) @ affine, [[0, 0, 0], [0, 0, volume.shape[2] - 1]])
    np.testing.assert_allclose(places[:, 2], [0, field.shape[2] - 1], atol=TOLERANCE)


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


def test_specks_that_skull_stripping_left_do_not_move_the_field(scan):
    speckled = np.pad(scan, ((0, 0), (60, 0), (30, 0)))
    speckled[3, 2, 1] = speckled[40, 5, 2] = 7
    affine = LPS @ from_matvec(np.eye(3), [0, -60, -30])
    bare = np.where(np.indices(speckled.shape)[1] < 60, 0, speckled)
    fields = [place_grid(GEOMETRY, volume != 0, affine, depth=39) for volume in (bare, speckled)]
    np.testing.assert_array_equal(fields[0][0].affine, fields[1][0].affine)
    assert fields[0][1] == 0
    assert fields[1][1] == pytest.approx(2 / np.count_nonzero(speckled))


def test_a_brain_that_does_not_fit_says_how_much_is_lost(scan):
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
        (np.ones((4, 4, 400), bool), np.diag([1.0, 1, 90, 1]), "35910 mm long"),
        (np.ones((4, 4, 4), bool), nibabel.affines.from_matvec([[4, -1e5, 0], [0, 4, 0], [0, 0, 4]]), "300012 mm long"),
    ],
)
def test_what_lies_nowhere_is_refused(brain, affine, message):
    with pytest.raises(ValueError, match=message):
        place_grid(GEOMETRY, brain, affine)
