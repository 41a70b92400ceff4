"""Checks of volumes, the same in preprocessing and in prediction, and of the slices made from them."""

from collections.abc import Mapping

import numpy as np

from datasets.cohorts import MASKS

BACKGROUND = -3.0  # normalised intensity of the background and the lower quantile
MAX_INTENSITY = 1e3  # normalised; a training would diverge on single damaged voxels beyond it
BRAIN_LITRES = (0.1, 2.2)  # adults have 1 to 1.9; slabs of some slices less; heads with a skull 3; noise in the air 8
MAX_MISSING = 0.1  # share of the brain where a modality may be 0 without a warning
MAX_JUMPS = 0.002  # share of neighbouring voxels of an integer type that may differ by more than half of its range


def require_background(volume: np.ndarray) -> None:
    """Check that all voxels are finite, and that the background is 0, as after skull stripping.

    Raises:
        ValueError: if any is not finite, or most voxels of the six faces share another value than 0.
    """
    if not np.isfinite(volume).all():
        raise ValueError("some voxels are not finite")
    faces = np.concatenate([np.moveaxis(volume, axis, 0)[end].ravel() for axis in range(3) for end in (0, -1)])
    value = np.median(faces)  # of more than half of them, if they share it
    if value != 0 and np.mean(faces == value) > 0.5:
        remedy = "set all voxels outside the brain to 0 (in preprocessing, a brainmask does it)"
        raise ValueError(f"its background is {value:g}, not 0: {remedy}")


def brain_warnings(brain: np.ndarray, affine: np.ndarray) -> list[str]:
    """Return a warning if the brain mask, bool [I, J, K], has a volume that no brain has."""
    litres, (least, most) = np.count_nonzero(brain) * abs(np.linalg.det(affine[:3, :3])) / 1e6, BRAIN_LITRES
    if litres > most:
        remedy = "skull-strip it, or in preprocessing name a brainmask; expect false positives"
        return [f"more than {most} litres are non-zero, more than any brain: {remedy}"]
    if litres < least:
        return [f"less than {least} litres are non-zero, less than any brain: check the voxel size and the brainmask"]
    return []


def intensity_warnings(volume: np.ndarray) -> list[str]:
    """Return a warning if integers have wrapped around: where they do, neighbours differ by nearly the type's range."""
    if volume.dtype.kind not in "iu":
        return []
    limits = np.iinfo(volume.dtype)
    half = (int(limits.max) - int(limits.min)) / 2
    if int(volume.max()) - int(volume.min()) <= half:
        return []
    first, second = volume[..., :-1], volume[..., 1:]
    within = (first != 0) & (second != 0)
    jumps = np.abs(first[within].astype(float) - second[within]) > half
    if np.count_nonzero(jumps) <= MAX_JUMPS * jumps.size:
        return []
    return [f"intensities seem to have wrapped around {volume.dtype}: export the scan with a larger type"]


def coverage_warnings(nonzero: Mapping[str, np.ndarray], brain: np.ndarray) -> list[str]:
    """Return warnings about gaps in modalities, given their non-zero voxels and the brain, bool [H, W, D]."""
    warnings = []
    for modality, filled in nonzero.items():
        if np.count_nonzero(brain & ~filled) > MAX_MISSING * np.count_nonzero(brain):
            warnings.append(f"{modality} is 0 in more than {MAX_MISSING:.0%} of the brain")
        (indices,) = filled.any(axis=(0, 1)).nonzero()
        if len(indices) < indices[-1] - indices[0] + 1:
            warnings.append(f"{modality} has empty slices between others")
    return warnings


def require_normalised(kind: str, array: np.ndarray) -> None:
    """Raise a ValueError unless the values of an array can be those of a slice of this kind."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"values of type {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if kind in MASKS:
        most = 1 if kind == "brainmask" else 255
        if not (low >= 0 and high <= most) or (array.dtype.kind == "f" and (array % 1).any()):
            raise ValueError(f"a {kind} must hold whole numbers from 0 to {most}, not {low:g} to {high:g}")
    elif not (abs(low - BACKGROUND) < 1e-3 and BACKGROUND < high <= MAX_INTENSITY):
        expected = f"{BACKGROUND:g}, the background, to at most {MAX_INTENSITY:g}"
        raise ValueError(f"its values range from {low:g} to {high:g}, but those of a slice from {expected}")
