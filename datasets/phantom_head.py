"""One phantom: a head of real anatomy under a random deformation, a tumour in it, and its scans.

Everything is drawn from (seed, subject number). The contrasts that make a tumour faint or obvious are the tables at the
top.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

# Geometry of BraTS 2021: 1 mm voxels; x runs to the left, y to the back, z to the top of the head.
SHAPE = (240, 240, 155)
AFFINE = ((-1.0, 0, 0, 0), (0, -1.0, 0, 239), (0, 0, 1.0, 0), (0, 0, 0, 1.0))

# The voxel that the middle of the brain falls on: the lateral ventricles come to slices 70 to 90, as in BraTS.
CENTER = (118, 131, 75)
TEMPLATE_CENTER = (98, 117, 77.5)
TEMPLATE_HALF_SIZE = (74, 92, 79)
SIZE = (0.84, 0.93)  # a subject's size against the template's, which is larger than most brains

# Every contrast is a ratio to the subject's own grey matter in that modality, before bias field and noise.
# Healthy tissue: modality → tissue → the range that a subject's ratio is drawn from.
TISSUE_CONTRAST = {
    "flair": {"wm": (0.78, 0.88), "csf": (0.18, 0.28)},
    "t1": {"wm": (1.28, 1.42), "csf": (0.32, 0.44)},
    "t1ce": {"wm": (1.22, 1.36), "csf": (0.32, 0.44)},
    "t2": {"wm": (0.70, 0.80), "csf": (2.00, 2.40)},
}
# Aged white matter, in everyone around the ventricles and in small spots: modality → ratio where it is fully aged.
AGEING_CONTRAST = {"flair": 1.45, "t1": 1.05, "t1ce": 1.02, "t2": 1.20}
# Tumour: BraTS label → modality → (ratio in the faintest tumour, ratio in the most obvious one). One draw a tumour,
# its obviousness, moves all of them together from the first to the second.
TUMOUR_CONTRAST = {
    2: {"flair": (1.05, 1.65), "t1": (1.05, 0.75), "t1ce": (1.05, 0.75), "t2": (1.20, 1.90)},  # oedema
    4: {"flair": (1.00, 1.50), "t1": (0.95, 0.80), "t1ce": (1.10, 2.20), "t2": (1.10, 1.60)},  # enhancing rim
    1: {"flair": (0.95, 0.45), "t1": (0.85, 0.50), "t1ce": (0.85, 0.50), "t2": (1.30, 2.20)},  # necrotic core
}
# Slices that a tumour's center lies in (half open). Preprocessing looks at [70, 90): a val or test subject needs tumour
# there, a training subject slices without.
TUMOUR_SLICES = {"train": (45, 115), "val": (70, 90), "test": (70, 90)}
TUMOUR_RADIUS = (12, 34)  # mm
TUMOUR_RADIUS_Z = (7, 13)  # mm, the most it is from top to bottom: the head keeps healthy slices

BIAS = (0.08, 0.2)  # standard deviation of the bias field's logarithm
NOISE = (0.02, 0.04)  # standard deviation, in units of grey matter
SCALE = (200, 800)  # grey matter's stored intensity: scanners have no unit for it


class Anatomy(NamedTuple):
    """One subject's healthy head. V is the number of its brain voxels, in the order of `coords`."""

    coords: np.ndarray  # [V, 3] int, each voxel's place in the volume
    box: tuple[int, int, int]  # size of the box around the brain
    brain: np.ndarray  # [*box] bool
    gm: np.ndarray  # [V] share of grey matter in 0 … 1; gm + wm + csf = 1
    wm: np.ndarray  # [V] of white matter
    csf: np.ndarray  # [V] of cerebrospinal fluid
    ageing: np.ndarray  # [V] share of the voxel that is aged white matter, 0 … wm


class Tumour(NamedTuple):
    """One subject's tumour. Its compartments are nested, each one painted over the one before."""

    obviousness: float  # 0 faint … 1 obvious
    shares: dict[int, np.ndarray]  # BraTS label → [V] share of the voxel in 0 … 1, from the outermost inwards
    texture: np.ndarray  # [V] a factor around 1 on the tumour's intensity


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Gaussian noise, of unit variance in every voxel and smooth over about `scale` voxels. [*shape] float32."""
    knots = [np.arange(-scale, n + 2 * scale, scale) for n in shape]
    noise = rng.standard_normal([len(k) for k in knots], dtype=np.float32)
    for n, k in zip(shape, knots, strict=True):
        basis = np.exp(-0.5 * ((np.arange(n)[:, None] - k) / scale) ** 2)
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)  # rows of unit length keep the variance at 1
        # Takes the first axis away and appends its fine one, so that three turns restore the order. Not a matrix
        # product: BLAS would start threads in every worker.
        noise = np.einsum("a...,ia->...i", noise, basis.astype(np.float32))
    return noise


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
    maps["near"] = (gaussian_filter(ventricles, 4, truncate=3) / 0.4).clip(0, 1)
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
    source += 2.5 * np.stack([smooth_noise(rng, box, 20).ravel() for _ in range(3)])

    maps = load_templates()
    brain = map_coordinates(maps["brain"], source, order=0) > 0
    gm, wm, near = (map_coordinates(maps[name], source[:, brain], order=1) for name in ("gm", "wm", "near"))
    # The templates are the average of many heads, hence blurred: a power sharpens them. The factor on the fluid
    # makes the sulci narrow or wide.
    shares = np.stack([gm, wm, rng.uniform(1.2, 2.4) * (1 - gm - wm).clip(0, 1)]) ** 1.7
    gm, wm, csf = shares / shares.sum(0)
    coords = grid[:, brain].T.astype(np.int32) + corner.astype(np.int32)
    ageing = wm * (rng.uniform(0.3, 1) * near + white_matter_spots(rng, coords, wm)).clip(0, 1)
    return Anatomy(coords, box, brain.reshape(box), gm, wm, csf, ageing)


def white_matter_spots(rng: np.random.Generator, coords: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """The small round lesions that ageing heads have, 1 to 3 mm in radius. [V] in 0 … 1."""
    spots = np.zeros(len(coords), np.float32)
    for center in coords[rng.choice(np.flatnonzero(wm > 0.9), rng.integers(2, 15))]:
        radius = rng.uniform(1, 3)
        around = np.flatnonzero((np.abs(coords - center) < 3 * radius).all(1))
        distance = np.linalg.norm(coords[around] - center, axis=1)
        spots[around] = np.maximum(spots[around], np.exp(-0.5 * (distance / radius) ** 2))
    return spots


def grow_tumour(rng: np.random.Generator, anatomy: Anatomy, slices: tuple[int, int]) -> Tumour:
    """Grow a tumour around a voxel of white matter in `slices` (half open).

    It is an ellipsoid with a noisy outline and an enhancing rim and a necrotic core within; its oedema follows the
    white matter and spares fluid.
    """
    z = anatomy.coords[:, 2]
    center = anatomy.coords[rng.choice(np.flatnonzero((anatomy.wm > 0.9) & (z >= slices[0]) & (z < slices[1])))]
    radius = rng.uniform(*TUMOUR_RADIUS) * rng.uniform(0.75, 1.25, 3)
    radius[2] = min(radius[2], rng.uniform(*TUMOUR_RADIUS_Z))
    size = radius.prod() ** (1 / 3)

    reach = np.ceil(1.6 * radius).astype(int)
    around = np.flatnonzero((np.abs(anatomy.coords - center) <= reach).all(1))
    offset = anatomy.coords[around] - center
    place = tuple((offset + reach).T)
    coarse, fine = (smooth_noise(rng, tuple(2 * reach + 1), scale)[place] for scale in (size / 2, 3))
    # 0 at the center and 1 at the outline. The noise stays well below 1, so that the center always is tumour.
    level = np.linalg.norm(offset / radius, axis=1) + (0.2 * coarse + 0.07 * fine).clip(-0.5, 0.5)

    rim = rng.uniform(0.3, 0.7)
    core = rim - rng.uniform(3, 6) / size
    inside = ramp(level, rim, 1.5 / size)
    infiltration = rng.uniform(1, 4) / size  # width of the oedema's edge, sharp or washed out
    oedema = ramp(level + 0.4 * (1 - anatomy.wm[around]), 1, infiltration) * (1 - anatomy.csf[around])
    compartments = {2: np.maximum(oedema, inside), 4: inside, 1: ramp(level, core, 1.5 / size)}

    shares = {label: np.zeros(len(z), np.float32) for label in compartments}
    for label, share in compartments.items():
        shares[label][around] = share
    texture = np.ones(len(z), np.float32)
    texture[around] += 0.05 * fine
    return Tumour(rng.uniform(), shares, texture)


def scan(rng: np.random.Generator, anatomy: Anatomy, tumour: Tumour, modality: str) -> np.ndarray:
    """Image the head in one modality. [V] int16, above 0."""
    wm, csf = (rng.uniform(*TISSUE_CONTRAST[modality][tissue]) for tissue in ("wm", "csf"))
    image = anatomy.gm + wm * anatomy.wm + csf * anatomy.csf
    image += anatomy.ageing * (AGEING_CONTRAST[modality] - wm)
    for label, share in tumour.shares.items():
        faint, obvious = TUMOUR_CONTRAST[label][modality]
        ratio = faint + tumour.obviousness * (obvious - faint)
        image += share * (ratio * tumour.texture - image)

    bias = smooth_noise(rng, anatomy.box, 50)[anatomy.brain]
    image *= np.exp(rng.uniform(*BIAS) * (bias - bias.mean()))
    real, imaginary = rng.uniform(*NOISE) * rng.standard_normal((2, len(image)), dtype=np.float32)
    image = np.hypot(image + real, imaginary)  # the magnitude of a complex signal: the noise is Rician
    scale = np.exp(rng.uniform(*np.log(SCALE)))
    return np.rint(scale * image).clip(1, 32767).astype(np.int16)


def make_subject(seed: int, number: int, split: str) -> tuple[dict[str, np.ndarray], Anatomy, Tumour]:
    """Draw a subject: its volumes by kind (int16 modalities and uint8 `seg`, [240, 240, 155]) and their truth."""
    rng = np.random.default_rng([seed, number])
    anatomy = make_anatomy(rng)
    tumour = grow_tumour(rng, anatomy, TUMOUR_SLICES[split])
    voxels = {modality: scan(rng, anatomy, tumour, modality) for modality in TISSUE_CONTRAST}
    voxels["seg"] = np.zeros(len(anatomy.coords), np.uint8)
    for label, share in tumour.shares.items():
        voxels["seg"][share > 0.5] = label

    volumes = {kind: np.zeros(SHAPE, values.dtype, order="F") for kind, values in voxels.items()}
    place = tuple(anatomy.coords.T)
    for kind, values in voxels.items():
        volumes[kind][place] = values
    return volumes, anatomy, tumour
