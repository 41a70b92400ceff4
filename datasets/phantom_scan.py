"""What a scanner makes of a phantom's head: contrast, heterogeneity, and the ways of each modality's acquisition.

Modalities are no recolourings of one map: every table here is a source of what one shows and another does not.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d

from .phantom_anatomy import Anatomy, smooth_noise
from .phantom_tumour import Tumour

# Every contrast is a ratio to the subject's own grey matter in that modality, before shading and noise.
# Healthy tissue: modality → tissue → the range that a subject's ratio is drawn from.
TISSUE_CONTRAST = {
    "flair": {"wm": (0.80, 0.88), "csf": (0.18, 0.38)},
    "t1": {"wm": (1.14, 1.29), "csf": (0.40, 0.60)},
    "t1ce": {"wm": (1.11, 1.29), "csf": (0.45, 0.70)},
    "t2": {"wm": (0.70, 0.84), "csf": (1.65, 2.05)},
}
# Iron darkens the basal ganglia on T2 and FLAIR; myelin and calcium brighten pallidum and thalamus on T1.
NUCLEUS_CONTRAST = {
    "flair": {"caudate": (0.90, 1.05), "putamen": (0.80, 0.98), "pallidum": (0.70, 0.90), "thalamus": (0.85, 1.00)},
    "t1": {"caudate": (0.98, 1.10), "putamen": (1.02, 1.15), "pallidum": (1.08, 1.22), "thalamus": (1.08, 1.22)},
    "t1ce": {"caudate": (0.98, 1.15), "putamen": (1.02, 1.20), "pallidum": (1.05, 1.25), "thalamus": (1.05, 1.25)},
    "t2": {"caudate": (0.85, 1.00), "putamen": (0.70, 0.92), "pallidum": (0.60, 0.80), "thalamus": (0.82, 0.98)},
}
# Aged white matter, in everyone around the ventricles and in small spots: modality → ratio where it is fully aged.
AGEING_CONTRAST = {"flair": 1.35, "t1": 1.10, "t1ce": 1.05, "t2": 1.10}
# Blood that flows is dark, unless it carries gadolinium.
VESSEL_CONTRAST = {"flair": (0.5, 1.0), "t1": (0.4, 0.8), "t1ce": (1.5, 2.5), "t2": (0.5, 1.2)}

# Cell density, myelin and iron vary within a tissue, and each modality weighs them in its own way: standard deviation
# of the intensity's logarithm, by scale in mm.
HETEROGENEITY = {
    "flair": {5: 0.04, 20: 0.01},
    "t1": {5: 0.025, 20: 0.01},
    "t1ce": {5: 0.06, 20: 0.06},
    "t2": {5: 0.01, 20: 0.01},
}
FLOW = {"flair": 0.35, "t1": 0.20, "t1ce": 0.25, "t2": 0.20}  # the same for fluid, which moves
# A voxel that is partly fluid looks like fluid on T2 before it does on T1 or FLAIR: power of the share that is seen.
FLUID_SEEN = {"flair": 2.0, "t1": 1.5, "t1ce": 1.0, "t2": 0.5}

# Slices are thick in clinical scans, and resampled: axis (0 sagittal, 1 coronal, 2 axial) and thickness in mm.
SLICES = {"flair": ((2,), (3, 5)), "t2": ((2,), (3, 5)), "t1": ((0, 2, 2, 2), (2, 4)), "t1ce": ((0, 1, 2), (1, 3))}
SURROUNDINGS = 0.8  # what thick slices mix into the brain from beyond its surface: fluid, dura and fat
SHIFT = 0.3  # mm, the most that a modality is misregistered along each axis
SHADING = (0.08, 0.22)  # standard deviation of the coils' shading (logarithm), which all modalities of a subject share
OWN_SHADING = (0.01, 0.04)  # and of what each has beside it
NOISE = {"flair": (0.02, 0.04), "t1": (0.01, 0.02), "t1ce": (0.035, 0.075), "t2": (0.025, 0.055)}  # of grey matter
SCALE = (200, 800)  # grey matter's stored intensity: scanners have no unit for it


def shading(rng: np.random.Generator, anatomy: Anatomy, deviation: float) -> np.ndarray:
    """The logarithm of a smooth factor on the intensities, with mean 0. [V]"""
    field = smooth_noise(rng, anatomy.brain.shape, 50)[anatomy.brain]
    return deviation * (field - field.mean())


def scan(rng: np.random.Generator, anatomy: Anatomy, tumour: Tumour, modality: str, coils: np.ndarray) -> np.ndarray:
    """Image the head in one modality, under the coils' shading [V]. [V] int16, above 0."""
    image = contrast(rng, anatomy, modality)
    tumour.paint(image, modality)
    image = acquire(rng, anatomy, image, modality)
    image *= np.exp(coils + shading(rng, anatomy, rng.uniform(*OWN_SHADING)))
    real, imaginary = rng.uniform(*NOISE[modality]) * rng.standard_normal((2, len(image)), dtype=np.float32)
    image = np.hypot(image + real, imaginary)  # the magnitude of a complex signal: the noise is Rician
    scale = np.exp(rng.uniform(*np.log(SCALE)))
    return np.rint(scale * image).clip(1, 32767).astype(np.int16)


def contrast(rng: np.random.Generator, anatomy: Anatomy, modality: str) -> np.ndarray:
    """The healthy head before acquisition, in units of grey matter. [V] float32"""
    wm, fluid = (rng.uniform(*TISSUE_CONTRAST[modality][tissue]) for tissue in ("wm", "csf"))
    fields = {scale: smooth_noise(rng, anatomy.brain.shape, scale)[anatomy.brain] for scale in HETEROGENEITY[modality]}
    solid = anatomy.gm + wm * anatomy.wm + anatomy.ageing * (AGEING_CONTRAST[modality] - wm)
    solid /= (anatomy.gm + anatomy.wm).clip(1e-3)
    for name, share in anatomy.nuclei.items():
        solid += share * (rng.uniform(*NUCLEUS_CONTRAST[modality][name]) - solid)
    solid *= np.exp(sum(HETEROGENEITY[modality][scale] * field for scale, field in fields.items()))
    seen = anatomy.csf ** FLUID_SEEN[modality]
    image = solid + seen * (fluid * np.exp(FLOW[modality] * fields[min(fields)]) - solid)
    return image + anatomy.vessels * (rng.uniform(*VESSEL_CONTRAST[modality]) - image)


def acquire(rng: np.random.Generator, anatomy: Anatomy, image: np.ndarray, modality: str) -> np.ndarray:
    """An image [V] as thick slices show it once they are resampled and, nearly, registered. [V]"""
    axes, thickness = SLICES[modality]
    volume = anatomy.in_box(image, SURROUNDINGS)
    volume = uniform_filter1d(volume, round(rng.uniform(*thickness)), axis=rng.choice(axes), mode="nearest")
    for axis, shift in enumerate(rng.uniform(-SHIFT, SHIFT, 3)):
        volume += abs(shift) * (np.roll(volume, 1 if shift > 0 else -1, axis) - volume)
    return volume[anatomy.brain]
