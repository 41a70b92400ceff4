"""Simulated MRI of a phantom's head: tissue contrast, heterogeneity and acquisition of each modality.

Modalities are more than recolourings of one tissue map: every table here adds information that others lack.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d

from .phantom_anatomy import Anatomy, smooth_noise
from .phantom_tumour import Tumour

# Every contrast is an intensity ratio to the subject's grey matter in that modality, before bias field and noise.
# Healthy tissue: modality → tissue → range of the ratio, which is drawn for each subject.
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
# White matter hyperintensities, periventricular and punctate, in every subject: modality → ratio.
WMH_CONTRAST = {"flair": 1.35, "t1": 1.10, "t1ce": 1.05, "t2": 1.10}
# Flowing blood is dark (flow void), unless it carries gadolinium.
VESSEL_CONTRAST = {"flair": (0.5, 1.0), "t1": (0.4, 0.8), "t1ce": (1.5, 2.5), "t2": (0.5, 1.2)}

# Cell density, myelin and iron vary within a tissue and affect each modality differently: scale in mm → standard
# deviation of the logarithm of the intensity.
HETEROGENEITY = {
    "flair": {5: 0.04, 20: 0.01},
    "t1": {5: 0.025, 20: 0.01},
    "t1ce": {5: 0.06, 20: 0.06},
    "t2": {5: 0.01, 20: 0.01},
}
CSF_FLOW = {"flair": 0.35, "t1": 0.20, "t1ce": 0.25, "t2": 0.20}  # the same for CSF, due to flow
# Partial volume: exponent on the CSF fraction. A voxel with some CSF looks like CSF on T2 sooner than on T1 or FLAIR.
CSF_EXPONENT = {"flair": 2.0, "t1": 1.5, "t1ce": 1.0, "t2": 0.5}

# Clinical scans have thick slices, later resampled: axes (0 sagittal, 1 coronal, 2 axial) and thickness range in mm.
SLICES = {"flair": ((2,), (3, 5)), "t2": ((2,), (3, 5)), "t1": ((0, 2, 2, 2), (2, 4)), "t1ce": ((0, 1, 2), (1, 3))}
OUTSIDE_BRAIN = 0.8  # mean intensity of CSF, dura and fat, which thick slices mix into the brain's surface
MAX_SHIFT = 0.3  # mm, misregistration of a modality along each axis
BIAS_FIELD = (0.08, 0.22)  # standard deviation of the log bias field that all modalities of a subject share
OWN_BIAS_FIELD = (0.01, 0.04)  # the same for the additional bias field of each modality
NOISE = {"flair": (0.02, 0.04), "t1": (0.01, 0.02), "t1ce": (0.035, 0.075), "t2": (0.025, 0.055)}  # of grey matter
GM_INTENSITY = (200, 800)  # stored intensity of grey matter: MRI has no absolute unit


def bias_field(rng: np.random.Generator, anatomy: Anatomy, deviation: float) -> np.ndarray:
    """Draw the logarithm of a smooth multiplicative field, with mean 0, as [V]."""
    field = smooth_noise(rng, anatomy.brain.shape, 50)[anatomy.brain]
    return deviation * (field - field.mean())


def scan(rng: np.random.Generator, anatomy: Anatomy, tumour: Tumour, modality: str, bias: np.ndarray) -> np.ndarray:
    """Simulate one modality, given the log bias field [V] shared by all of them. Returns [V] int16, above 0."""
    image = contrast(rng, anatomy, modality)
    tumour.paint(image, modality)
    image = acquire(rng, anatomy, image, modality)
    image *= np.exp(bias + bias_field(rng, anatomy, rng.uniform(*OWN_BIAS_FIELD)))
    real, imaginary = rng.uniform(*NOISE[modality]) * rng.standard_normal((2, len(image)), dtype=np.float32)
    image = np.hypot(image + real, imaginary)  # magnitude of the complex signal: Rician noise
    scale = np.exp(rng.uniform(*np.log(GM_INTENSITY)))
    return np.rint(scale * image).clip(1, 32767).astype(np.int16)


def contrast(rng: np.random.Generator, anatomy: Anatomy, modality: str) -> np.ndarray:
    """Draw the healthy brain before acquisition, relative to grey matter, as [V] float32."""
    wm, csf = (rng.uniform(*TISSUE_CONTRAST[modality][tissue]) for tissue in ("wm", "csf"))
    fields = {scale: smooth_noise(rng, anatomy.brain.shape, scale)[anatomy.brain] for scale in HETEROGENEITY[modality]}
    solid = anatomy.gm + wm * anatomy.wm + anatomy.wmh * (WMH_CONTRAST[modality] - wm)
    solid /= (anatomy.gm + anatomy.wm).clip(1e-3)
    for name, share in anatomy.nuclei.items():
        solid += share * (rng.uniform(*NUCLEUS_CONTRAST[modality][name]) - solid)
    solid *= np.exp(sum(HETEROGENEITY[modality][scale] * field for scale, field in fields.items()))
    csf_weight = anatomy.csf ** CSF_EXPONENT[modality]
    image = solid + csf_weight * (csf * np.exp(CSF_FLOW[modality] * fields[min(fields)]) - solid)
    return image + anatomy.vessels * (rng.uniform(*VESSEL_CONTRAST[modality]) - image)


def acquire(rng: np.random.Generator, anatomy: Anatomy, image: np.ndarray, modality: str) -> np.ndarray:
    """Return an image [V] as acquired in thick slices, resampled and slightly misregistered."""
    axes, thickness = SLICES[modality]
    volume = anatomy.unmask(image, OUTSIDE_BRAIN)
    volume = uniform_filter1d(volume, round(rng.uniform(*thickness)), axis=rng.choice(axes), mode="nearest")
    for axis, shift in enumerate(rng.uniform(-MAX_SHIFT, MAX_SHIFT, 3)):
        volume += abs(shift) * (np.roll(volume, 1 if shift > 0 else -1, axis) - volume)
    return volume[anatomy.brain]
