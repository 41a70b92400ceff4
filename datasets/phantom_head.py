"""One phantom: a head, a tumour in it, and its scans. Everything is drawn from (seed, subject number)."""

import numpy as np

from .phantom_anatomy import SHAPE, Anatomy, make_anatomy
from .phantom_scan import SHADING, TISSUE_CONTRAST, scan, shading
from .phantom_tumour import TUMOUR_SLICES, Tumour, grow_tumour


def make_subject(seed: int, number: int, split: str) -> tuple[dict[str, np.ndarray], Anatomy, Tumour]:
    """Draw a subject: its volumes by kind (int16 modalities and uint8 `seg`, [240, 240, 155]) and their truth."""
    rng = np.random.default_rng([seed, number])
    anatomy, tumour = grow_tumour(rng, make_anatomy(rng), TUMOUR_SLICES[split])
    coils = shading(rng, anatomy, rng.uniform(*SHADING))
    voxels = {modality: scan(rng, anatomy, tumour, modality, coils) for modality in TISSUE_CONTRAST}
    voxels["seg"] = np.zeros(len(anatomy.coords), np.uint8)
    for label, share in tumour.shares.items():
        voxels["seg"][share > 0.5] = label

    volumes = {kind: np.zeros(SHAPE, values.dtype, order="F") for kind, values in voxels.items()}
    place = tuple(anatomy.coords.T)
    for kind, values in voxels.items():
        volumes[kind][place] = values
    return volumes, anatomy, tumour
