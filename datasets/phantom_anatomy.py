"""A phantom's healthy head: the tissue maps of MNI152 under a random deformation, with what the maps do not show."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy.ndimage import binary_erosion, gaussian_filter, map_coordinates
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

# Geometry of BraTS 2021: 1 mm voxels; x runs to the left, y to the back, z to the top of the head.
SHAPE = (240, 240, 155)
AFFINE = ((-1.0, 0, 0, 0), (0, -1.0, 0, 239), (0, 0, 1.0, 0), (0, 0, 0, 1.0))

# The voxel that the middle of the brain falls on: the lateral ventricles come to slices 70 to 90, as in BraTS.
CENTER = (118, 131, 75)
TEMPLATE_CENTER = (98, 117, 77.5)
TEMPLATE_HALF_SIZE = (74, 92, 79)
TEMPLATE_ORIGIN = (98, 134, 72)  # the voxel at 0 mm of MNI space

SIZE = (0.84, 0.93)  # a subject's size against the template's, which is larger than most brains
# Of the smooth deformation: scale → standard deviation, mm. The widest makes heads asymmetric.
DEFORMATION = {50: 3.0, 20: 2.5}
SULCI = (0.8, 1.8)  # factor on the fluid: sulci are narrow or, with atrophy, wide
FOLDS = 1.0  # standard deviation of its logarithm over 2 mm: the average of many heads has no folds of its own
VENTRICLES = (0.9, 1.3)  # how near the ventricles of the template (1.25 is their edge) a subject's reach

# Deep grey nuclei: centre in MNI space (mm; mirrored to the other side) and half axes.
NUCLEI = {
    "caudate": ((13, 11, 11), (5, 9, 8)),
    "putamen": ((26, 3, 2), (6, 14, 9)),
    "pallidum": ((20, -3, 0), (5, 7, 6)),
    "thalamus": ((11, -18, 8), (8, 12, 8)),
}
RIM = 2  # mm of the brain's surface that dura and veins lie on


class Anatomy(NamedTuple):
    """One subject's healthy head. V is the number of its brain voxels, in the order of `coords`."""

    coords: np.ndarray  # [V, 3] int, each voxel's place in the volume
    brain: np.ndarray  # [*box] bool, in the smallest box with some voxels around the brain
    gm: np.ndarray  # [V] share of grey matter in 0 … 1; gm + wm + csf = 1
    wm: np.ndarray  # [V] of white matter
    csf: np.ndarray  # [V] of cerebrospinal fluid
    ageing: np.ndarray  # [V] share of the voxel that is aged white matter, 0 … wm
    nuclei: dict[str, np.ndarray]  # [V] share of the voxel that is one of the deep grey nuclei
    vessels: np.ndarray  # [V] share that takes up contrast agent: veins in sulci, dura, choroid plexus

    def in_box(self, values: np.ndarray, outside: float) -> np.ndarray:
        """Values [V] in the box around the brain, [*box] float32."""
        volume = np.full(self.brain.shape, outside, np.float32)
        volume[self.brain] = values
        return volume


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Gaussian noise, of unit variance in every voxel and smooth over about `scale` voxels. [*shape] float32."""
    knots = [np.arange(-scale, n + 2 * scale, scale) for n in shape]
    noise = rng.standard_normal([len(k) for k in knots], dtype=np.float32)
    for n, k in zip(shape, knots, strict=True):
        distance = (np.arange(n)[:, None] - k) / scale
        basis = np.exp(-0.5 * distance**2) * (np.abs(distance) < 4)
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)  # rows of unit length keep the variance at 1
        # A sparse product, since a dense one would start BLAS's threads in every worker. It makes the first axis fine
        # and puts it last, so that three turns restore the order.
        fine = csr_array(basis.astype(np.float32)) @ noise.reshape(len(k), -1)
        noise = np.moveaxis(fine.reshape(n, *noise.shape[1:]), 0, -1)
    return np.ascontiguousarray(noise)


def ramp(level: np.ndarray, edge: float, width: float) -> np.ndarray:
    """1 where `level` is below `edge`, 0 above, and linear over `width` around it."""
    return (0.5 + (edge - level) / width).clip(0, 1)


@lru_cache(maxsize=1)
def load_templates() -> dict[str, np.ndarray]:
    """MNI152 maps in 0 … 1, [197, 233, 189] float32 at 1 mm, x to the right and y to the front.

    `gm` and `wm` as they come, the `brain` mask drawn in a little, and `near`: how near the ventricles are.
    """
    loaders = {"gm": load_mni152_gm_template, "wm": load_mni152_wm_template, "brain": load_mni152_brain_mask}
    maps = {name: np.asarray(load(resolution=1).dataobj, np.float32) for name, load in loaders.items()}
    # Fluid in the middle of the head is in the ventricles.
    middle = np.s_[63:134, 84:169, 67:107]
    ventricles = np.zeros_like(maps["brain"])
    ventricles[middle] = (maps["brain"] - maps["gm"] - maps["wm"])[middle] > 0.5
    maps["near"] = gaussian_filter(ventricles, 4, truncate=3) / 0.4
    # The mask is generous: as it comes, a ring of fluid would surround the brain.
    maps["brain"] = (gaussian_filter(maps["brain"], 1.5, truncate=2) > 0.75).astype(np.float32)
    return maps


def make_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a healthy head: the templates under a random size, rotation and smooth deformation."""
    size = rng.uniform(*SIZE) * rng.uniform(0.97, 1.03, 3)
    reach = np.ceil(size * TEMPLATE_HALF_SIZE).astype(int) + 6
    corner = np.maximum(np.array(CENTER) - reach, 0)
    box = tuple((np.minimum(np.array(CENTER) + reach, SHAPE) - corner).tolist())

    # Where in the template each voxel of the box comes from; x and y run the other way there.
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
    gm, wm, near = (map_coordinates(maps[name], source, order=1) for name in ("gm", "wm", "near"))
    # The templates are the average of many heads, hence blurred: a power sharpens them.
    folds = rng.uniform(*SULCI) * np.exp(FOLDS * smooth_noise(rng, box, 2).ravel()[brain])
    shares = np.stack([gm, wm, folds * (1 - gm - wm).clip(0, 1)]) ** 1.7
    gm, wm, csf = shares / shares.sum(0)
    ventricles = ramp(-near, -rng.uniform(*VENTRICLES), 0.15)
    gm, wm, csf = (1 - ventricles) * gm, (1 - ventricles) * wm, csf + ventricles * (1 - csf)

    coords = grid[:, brain].T.astype(np.int32) + corner.astype(np.int32)
    brain = brain.reshape(box)
    ageing = wm * (rng.uniform(0.3, 1) * near.clip(0, 1) + white_matter_spots(rng, coords, wm)).clip(0, 1)
    return Anatomy(coords, brain, gm, wm, csf, ageing, deep_nuclei(source), vessels(rng, brain, csf))


def deep_nuclei(source: np.ndarray) -> dict[str, np.ndarray]:
    """Ellipsoids on both sides of the head, as shares [V] in 0 … 1 of the voxels at `source` [3, V] in the template."""
    place = np.abs(source[0] - TEMPLATE_ORIGIN[0]), source[1] - TEMPLATE_ORIGIN[1], source[2] - TEMPLATE_ORIGIN[2]
    deep = np.flatnonzero((place[0] < 35) & (np.abs(place[1]) < 35) & (np.abs(place[2]) < 25))
    place = np.stack(place)[:, deep].T
    nuclei = {}
    for name, (center, axes) in NUCLEI.items():
        nuclei[name] = np.zeros(source.shape[1], np.float32)
        nuclei[name][deep] = ramp(np.linalg.norm((place - center) / axes, axis=1), 1, 0.25)
    return nuclei


def white_matter_spots(rng: np.random.Generator, coords: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """The small round lesions that ageing heads have, 1 to 3 mm in radius. [V] in 0 … 1."""
    spots = np.zeros(len(coords), np.float32)
    for center in coords[rng.choice(np.flatnonzero(wm > 0.9), rng.integers(2, 15))]:
        radius = rng.uniform(1, 3)
        around = np.flatnonzero((np.abs(coords - center) < 3 * radius).all(1))
        distance = np.linalg.norm(coords[around] - center, axis=1)
        spots[around] = np.maximum(spots[around], np.exp(-0.5 * (distance / radius) ** 2))
    return spots


def vessels(rng: np.random.Generator, brain: np.ndarray, csf: np.ndarray) -> np.ndarray:
    """Veins in sulci, choroid plexus and patches of dura, which take up contrast agent. [V] in 0 … 1."""
    sheets = ramp(np.abs(smooth_noise(rng, brain.shape, 5)[brain]), 0.25, 0.2)  # thin, and through all fluid
    rim = (brain & ~binary_erosion(brain, iterations=RIM))[brain]
    patches = ramp(-smooth_noise(rng, brain.shape, 12)[brain], -0.3, 0.5)
    return np.maximum(csf * sheets, rim * patches)
