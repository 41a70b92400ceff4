"""A phantom's tumour: where it is, what it displaces, and the contrast of its compartments."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from .phantom_anatomy import Anatomy, ramp, smooth_noise

# BraTS label → modality → the range that a tumour's ratio to grey matter is drawn from, each by itself: a rim that is
# bright on T1ce may be invisible on FLAIR.
TUMOUR_CONTRAST = {
    2: {"flair": (1.10, 1.75), "t1": (0.75, 1.05), "t1ce": (0.75, 1.05), "t2": (1.20, 1.90)},  # oedema
    4: {"flair": (1.00, 1.60), "t1": (0.80, 0.95), "t1ce": (1.10, 2.20), "t2": (1.10, 1.60)},  # enhancing rim
    1: {"flair": (0.45, 1.10), "t1": (0.50, 0.85), "t1ce": (0.50, 0.85), "t2": (1.30, 2.20)},  # necrotic core
}
# Slices that a tumour's center lies in (half open). Preprocessing looks at [70, 90): a val or test subject needs tumour
# there, a training subject slices without.
TUMOUR_SLICES = {"train": (45, 115), "val": (70, 90), "test": (70, 90)}
TUMOUR_RADIUS = (12, 34)  # mm
TUMOUR_RADIUS_Z = (7, 13)  # mm, the most it is from top to bottom: the head keeps healthy slices
MASS_EFFECT = (0.0, 0.3)  # how far tissue at the outline is pushed away, in radii


class Tumour(NamedTuple):
    """One subject's tumour. Its compartments are nested, each one painted over the one before."""

    contrast: dict[int, dict[str, float]]  # BraTS label → modality → ratio to grey matter
    shares: dict[int, np.ndarray]  # BraTS label → [V] share of the voxel in 0 … 1, from the outermost inwards
    texture: np.ndarray  # [V] a factor around 1 on the tumour's intensity

    def paint(self, image: np.ndarray, modality: str) -> None:
        """Put the tumour into an image [V], in place."""
        for label, share in self.shares.items():
            image += share * (self.contrast[label][modality] * self.texture - image)


def grow_tumour(rng: np.random.Generator, anatomy: Anatomy, slices: tuple[int, int]) -> tuple[Anatomy, Tumour]:
    """Grow a tumour around a voxel of white matter in `slices` (half open); the tissue around it makes way.

    It is an ellipsoid with a noisy outline and an enhancing rim and a necrotic core within; its oedema follows the
    white matter and spares fluid.
    """
    z = anatomy.coords[:, 2]
    center = anatomy.coords[rng.choice(np.flatnonzero((anatomy.wm > 0.9) & (z >= slices[0]) & (z < slices[1])))]
    radius = rng.uniform(*TUMOUR_RADIUS) * rng.uniform(0.75, 1.25, 3)
    radius[2] = min(radius[2], rng.uniform(*TUMOUR_RADIUS_Z))
    size = radius.prod() ** (1 / 3)
    anatomy = push_aside(anatomy, center, radius, rng.uniform(*MASS_EFFECT))

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
    return anatomy, Tumour(draw_contrast(rng), shares, texture)


def draw_contrast(rng: np.random.Generator) -> dict[int, dict[str, float]]:
    """The ratios of a tumour, each drawn by itself from TUMOUR_CONTRAST."""
    return {label: {m: rng.uniform(*ends) for m, ends in table.items()} for label, table in TUMOUR_CONTRAST.items()}


def push_aside(anatomy: Anatomy, center: np.ndarray, radius: np.ndarray, amount: float) -> Anatomy:
    """The head with the tissue around a tumour displaced outwards, most at its outline, by `amount` radii."""
    around = np.flatnonzero((np.abs(anatomy.coords - center) <= 3 * radius).all(1))
    offset = anatomy.coords[around] - center
    level = np.linalg.norm(offset / radius, axis=1)
    # Where each voxel's tissue comes from: nearer to the center, so that there it is stretched, and outside squeezed.
    pull = amount * np.exp(0.5 * (1 - level**2))
    corner = anatomy.coords[0] - np.argwhere(anatomy.brain)[0]
    places = (center + offset * (1 - pull[:, None].clip(0, 0.9)) - corner).T
    moved = {}
    for name in ("gm", "wm", "csf", "ageing"):
        values = getattr(anatomy, name)
        moved[name] = values.copy()
        moved[name][around] = map_coordinates(anatomy.in_box(values, 0), places, order=1)
    total = moved["gm"] + moved["wm"] + moved["csf"]
    return anatomy._replace(**{name: values / total.clip(1e-3) for name, values in moved.items()})
