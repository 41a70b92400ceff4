"""A phantom's tumour: its position, mass effect, compartments and their contrast."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from .phantom_anatomy import Anatomy, ramp, smooth_noise

# BraTS label → modality → range of the intensity ratio to grey matter, drawn independently: a rim that is bright on
# T1ce may be invisible on FLAIR.
TUMOUR_CONTRAST = {
    2: {"flair": (1.10, 1.75), "t1": (0.75, 1.05), "t1ce": (0.75, 1.05), "t2": (1.20, 1.90)},  # oedema
    4: {"flair": (1.00, 1.60), "t1": (0.80, 0.95), "t1ce": (1.10, 2.20), "t2": (1.10, 1.60)},  # enhancing rim
    1: {"flair": (0.45, 1.10), "t1": (0.50, 0.85), "t1ce": (0.50, 0.85), "t2": (1.30, 2.20)},  # necrotic core
}
# Range of slices, half open, for the tumour's center. In the slices that are preprocessed, [70, 90), val and test
# subjects need a tumour, and training subjects need healthy slices.
TUMOUR_SLICES = {"train": (45, 115), "val": (70, 90), "test": (70, 90)}
TUMOUR_RADIUS = (12, 34)  # mm
TUMOUR_RADIUS_Z = (7, 13)  # mm, upper limit of the vertical radius, which leaves healthy slices
MASS_EFFECT = (0.0, 0.3)  # displacement of tissue at the tumour's outline, in radii


class Tumour(NamedTuple):
    """One subject's tumour, with nested compartments that are painted from the outermost inwards."""

    contrast: dict[int, dict[str, float]]  # BraTS label → modality → intensity ratio to grey matter
    shares: dict[int, np.ndarray]  # BraTS label → [V] fraction of the voxel in 0 … 1, outermost compartment first
    texture: np.ndarray  # [V] factor on the tumour's intensity, around 1

    def paint(self, image: np.ndarray, modality: str) -> None:
        """Add the tumour to an image [V], in place."""
        for label, share in self.shares.items():
            image += share * (self.contrast[label][modality] * self.texture - image)


def grow_tumour(rng: np.random.Generator, anatomy: Anatomy, slices: tuple[int, int]) -> tuple[Anatomy, Tumour]:
    """Grow a tumour at a random white matter voxel in `slices` (half open) and displace the tissue around it.

    The tumour is an ellipsoid with a noisy outline, an enhancing rim and a necrotic core. Its oedema follows the white
    matter and spares CSF.
    """
    z = anatomy.coords[:, 2]
    center = anatomy.coords[rng.choice(np.flatnonzero((anatomy.wm > 0.9) & (z >= slices[0]) & (z < slices[1])))]
    radius = rng.uniform(*TUMOUR_RADIUS) * rng.uniform(0.75, 1.25, 3)
    radius[2] = min(radius[2], rng.uniform(*TUMOUR_RADIUS_Z))
    size = radius.prod() ** (1 / 3)
    anatomy = apply_mass_effect(anatomy, center, radius, rng.uniform(*MASS_EFFECT))

    reach = np.ceil(1.6 * radius).astype(int)
    around = np.flatnonzero((np.abs(anatomy.coords - center) <= reach).all(1))
    offset = anatomy.coords[around] - center
    voxels = tuple((offset + reach).T)
    coarse, fine = (smooth_noise(rng, tuple(2 * reach + 1), scale)[voxels] for scale in (size / 2, 3))
    # 0 at the center and 1 at the outline. The noise is clipped well below 1, so that the center is always tumour.
    level = np.linalg.norm(offset / radius, axis=1) + (0.2 * coarse + 0.07 * fine).clip(-0.5, 0.5)

    rim = rng.uniform(0.3, 0.7)
    core = rim - rng.uniform(3, 6) / size
    inside = ramp(level, rim, 1.5 / size)
    infiltration = rng.uniform(1, 4) / size  # width of the oedema's edge: sharp to diffuse
    oedema = ramp(level + 0.4 * (1 - anatomy.wm[around]), 1, infiltration) * (1 - anatomy.csf[around])
    compartments = {2: np.maximum(oedema, inside), 4: inside, 1: ramp(level, core, 1.5 / size)}

    shares = {label: np.zeros(len(z), np.float32) for label in compartments}
    for label, share in compartments.items():
        shares[label][around] = share
    texture = np.ones(len(z), np.float32)
    texture[around] += 0.05 * fine
    return anatomy, Tumour(draw_contrast(rng), shares, texture)


def draw_contrast(rng: np.random.Generator) -> dict[int, dict[str, float]]:
    """Draw a tumour's intensity ratios from TUMOUR_CONTRAST, each independently."""
    return {label: {m: rng.uniform(*ends) for m, ends in table.items()} for label, table in TUMOUR_CONTRAST.items()}


def apply_mass_effect(anatomy: Anatomy, center: np.ndarray, radius: np.ndarray, amount: float) -> Anatomy:
    """Displace the tissue around a tumour outwards, by up to `amount` radii at its outline."""
    around = np.flatnonzero((np.abs(anatomy.coords - center) <= 3 * radius).all(1))
    offset = anatomy.coords[around] - center
    level = np.linalg.norm(offset / radius, axis=1)
    # Each voxel samples tissue from closer to the center: tissue is stretched inside the tumour, compressed outside.
    pull = amount * np.exp(0.5 * (1 - level**2))
    corner = anatomy.coords[0] - np.argwhere(anatomy.brain)[0]
    sources = (center + offset * (1 - pull[:, None].clip(0, 0.9)) - corner).T
    moved = {}
    for name in ("gm", "wm", "csf", "wmh"):
        values = getattr(anatomy, name)
        moved[name] = values.copy()
        moved[name][around] = map_coordinates(anatomy.unmask(values, 0), sources, order=1)
    total = moved["gm"] + moved["wm"] + moved["csf"]
    return anatomy._replace(**{name: values / total.clip(1e-3) for name, values in moved.items()})
