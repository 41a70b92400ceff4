"""A phantom's healthy brain: randomly deformed MNI152 tissue maps, with deep nuclei, vessels and WMH added."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy.ndimage import binary_erosion, gaussian_filter, map_coordinates
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

# BraTS 2021 geometry: 1 mm voxels in LPS orientation (x to the left, y to the back, z to the top of the head).
SHAPE = (240, 240, 155)
AFFINE = ((-1.0, 0, 0, 0), (0, -1.0, 0, 239), (0, 0, 1.0, 0), (0, 0, 0, 1.0))

# Voxel of the brain's centre, which puts the lateral ventricles into slices 70 to 90, as in BraTS.
CENTER = (118, 131, 75)
TEMPLATE_CENTER = (98, 117, 77.5)
TEMPLATE_HALF_SIZE = (74, 92, 79)
TEMPLATE_ORIGIN = (98, 134, 72)  # voxel of the MNI origin, 0 mm

BRAIN_SIZE = (0.84, 0.93)  # relative to the template, which is larger than most brains
DEFORMATION = {50: 3.0, 20: 2.5}  # smoothness → standard deviation, mm; the smoothest makes heads asymmetric
SULCAL_WIDTH = (0.8, 1.8)  # factor on the CSF: narrow sulci to atrophy
FOLDING = 1.0  # standard deviation of that factor's logarithm at a scale of 2 mm: the average template has no folds
VENTRICLE_THRESHOLD = (0.9, 1.3)  # on `periventricular`: 1.25 is the template's own edge, lower is larger

# Deep grey nuclei: centre in MNI space (mm; mirrored to the other hemisphere) and semi-axes (mm).
NUCLEI = {
    "caudate": ((13, 11, 11), (5, 9, 8)),
    "putamen": ((26, 3, 2), (6, 14, 9)),
    "pallidum": ((20, -3, 0), (5, 7, 6)),
    "thalamus": ((11, -18, 8), (8, 12, 8)),
}
DURA_DEPTH = 2  # mm below the brain's surface that dura and veins reach


class Anatomy(NamedTuple):
    """One subject's healthy brain. V is the number of brain voxels, in the order of `coords`."""

    coords: np.ndarray  # [V, 3] int, voxel indices in the volume
    brain: np.ndarray  # [*box] bool, in a bounding box with a margin
    gm: np.ndarray  # [V] grey matter fraction in 0 … 1; gm + wm + csf = 1
    wm: np.ndarray  # [V] white matter fraction
    csf: np.ndarray  # [V] cerebrospinal fluid fraction
    wmh: np.ndarray  # [V] fraction of white matter hyperintensities, 0 … wm
    nuclei: dict[str, np.ndarray]  # [V] fraction of each of the deep grey nuclei
    vessels: np.ndarray  # [V] fraction that takes up contrast agent: veins in sulci, dura, choroid plexus

    def unmask(self, values: np.ndarray, outside: float) -> np.ndarray:
        """Return values [V] as a volume [*box] float32, `outside` beyond the brain."""
        volume = np.full(self.brain.shape, outside, np.float32)
        volume[self.brain] = values
        return volume


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Return Gaussian noise [*shape] float32 of unit variance, smooth over about `scale` voxels."""
    knots = [np.arange(-scale, n + 2 * scale, scale) for n in shape]
    noise = rng.standard_normal([len(k) for k in knots], dtype=np.float32)
    for n, k in zip(shape, knots, strict=True):
        distance = (np.arange(n)[:, None] - k) / scale
        basis = np.exp(-0.5 * distance**2) * (np.abs(distance) < 4)
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)  # rows of unit length keep the variance at 1
        # Sparse, because a dense product would start BLAS threads in every worker. Each pass interpolates the first
        # axis and moves it last, so three passes restore the order.
        fine = csr_array(basis.astype(np.float32)) @ noise.reshape(len(k), -1)
        noise = np.moveaxis(fine.reshape(n, *noise.shape[1:]), 0, -1)
    return np.ascontiguousarray(noise)


def ramp(level: np.ndarray, edge: float, width: float) -> np.ndarray:
    """Return 1 where `level` is below `edge` and 0 above, with a linear transition of the given width."""
    return (0.5 + (edge - level) / width).clip(0, 1)


@lru_cache(maxsize=1)
def load_templates() -> dict[str, np.ndarray]:
    """Load MNI152 maps, [197, 233, 189] float32 at 1 mm, x to the right and y to the front.

    `gm`, `wm` and the slightly eroded `brain` are in 0 … 1; `periventricular` is the blurred mask of the ventricles.
    """
    loaders = {"gm": load_mni152_gm_template, "wm": load_mni152_wm_template, "brain": load_mni152_brain_mask}
    maps = {name: np.asarray(load(resolution=1).dataobj, np.float32) for name, load in loaders.items()}
    # CSF in the middle of the head belongs to the ventricles.
    middle = np.s_[63:134, 84:169, 67:107]
    ventricles = np.zeros_like(maps["brain"])
    ventricles[middle] = (maps["brain"] - maps["gm"] - maps["wm"])[middle] > 0.5
    maps["periventricular"] = gaussian_filter(ventricles, 4, truncate=3) / 0.4
    # The template mask includes a rim of CSF; erode it.
    maps["brain"] = (gaussian_filter(maps["brain"], 1.5, truncate=2) > 0.75).astype(np.float32)
    return maps


def make_anatomy(rng: np.random.Generator) -> Anatomy:
    """Generate a healthy brain: scale, rotate and smoothly deform the templates at random."""
    size = rng.uniform(*BRAIN_SIZE) * rng.uniform(0.97, 1.03, 3)
    reach = np.ceil(size * TEMPLATE_HALF_SIZE).astype(int) + 6
    corner = np.maximum(np.array(CENTER) - reach, 0)
    box = tuple((np.minimum(np.array(CENTER) + reach, SHAPE) - corner).tolist())

    # Template coordinates of each voxel in the box; the template's x and y axes are reversed.
    rotation = Rotation.from_euler("xyz", rng.normal(0, 2, 3), degrees=True).as_matrix()
    matrix = (rotation @ np.diag(np.array([-1, -1, 1]) / size)).astype(np.float32)
    grid = np.indices(box, dtype=np.float32).reshape(3, -1)
    source = matrix @ (grid + (corner - CENTER)[:, None].astype(np.float32))
    source += np.array(TEMPLATE_CENTER, np.float32)[:, None]
    for scale, deviation in DEFORMATION.items():
        for axis in range(3):
            source[axis] += deviation * smooth_noise(rng, box, scale).ravel()

    maps = load_templates()
    brain = map_coordinates(maps["brain"], source, order=0) > 0
    source = source[:, brain]
    gm, wm, periventricular = (map_coordinates(maps[name], source, order=1) for name in ("gm", "wm", "periventricular"))
    # The templates average many heads and are blurred: a power sharpens them.
    folding = rng.uniform(*SULCAL_WIDTH) * np.exp(FOLDING * smooth_noise(rng, box, 2).ravel()[brain])
    fractions = np.stack([gm, wm, folding * (1 - gm - wm).clip(0, 1)]) ** 1.7
    gm, wm, csf = fractions / fractions.sum(0)
    ventricles = ramp(-periventricular, -rng.uniform(*VENTRICLE_THRESHOLD), 0.15)
    gm, wm, csf = (1 - ventricles) * gm, (1 - ventricles) * wm, csf + ventricles * (1 - csf)

    coords = grid[:, brain].T.astype(np.int32) + corner.astype(np.int32)
    brain = brain.reshape(box)
    wmh = wm * (rng.uniform(0.3, 1) * periventricular.clip(0, 1) + punctate_wmh(rng, coords, wm)).clip(0, 1)
    return Anatomy(coords, brain, gm, wm, csf, wmh, deep_nuclei(source), vessels(rng, brain, csf))


def deep_nuclei(source: np.ndarray) -> dict[str, np.ndarray]:
    """Return the fraction [V] of each nucleus, an ellipsoid in both hemispheres, at template voxels `source` [3, V]."""
    mni = np.abs(source[0] - TEMPLATE_ORIGIN[0]), source[1] - TEMPLATE_ORIGIN[1], source[2] - TEMPLATE_ORIGIN[2]
    deep = np.flatnonzero((mni[0] < 35) & (np.abs(mni[1]) < 35) & (np.abs(mni[2]) < 25))
    mni = np.stack(mni)[:, deep].T
    nuclei = {}
    for name, (center, axes) in NUCLEI.items():
        nuclei[name] = np.zeros(source.shape[1], np.float32)
        nuclei[name][deep] = ramp(np.linalg.norm((mni - center) / axes, axis=1), 1, 0.25)
    return nuclei


def punctate_wmh(rng: np.random.Generator, coords: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """Return small round white matter hyperintensities, 1 to 3 mm in radius, as [V] in 0 … 1."""
    spots = np.zeros(len(coords), np.float32)
    for center in coords[rng.choice(np.flatnonzero(wm > 0.9), rng.integers(2, 15))]:
        radius = rng.uniform(1, 3)
        around = np.flatnonzero((np.abs(coords - center) < 3 * radius).all(1))
        distance = np.linalg.norm(coords[around] - center, axis=1)
        spots[around] = np.maximum(spots[around], np.exp(-0.5 * (distance / radius) ** 2))
    return spots


def vessels(rng: np.random.Generator, brain: np.ndarray, csf: np.ndarray) -> np.ndarray:
    """Return veins in sulci, choroid plexus and patches of dura, which take up contrast agent, as [V] in 0 … 1."""
    sheets = ramp(np.abs(smooth_noise(rng, brain.shape, 5)[brain]), 0.25, 0.2)  # thin sheets throughout the CSF
    surface = (brain & ~binary_erosion(brain, iterations=DURA_DEPTH))[brain]
    patches = ramp(-smooth_noise(rng, brain.shape, 12)[brain], -0.3, 0.5)
    return np.maximum(csf * sheets, surface * patches)
