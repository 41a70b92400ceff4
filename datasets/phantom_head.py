"""One phantom subject: anatomy, tumour and scans, all drawn from (seed, subject number)."""

import numpy as np

from .phantom_anatomy import SHAPE, Anatomy, make_anatomy
from .phantom_scan import BIAS_FIELD, TISSUE_CONTRAST, bias_field, scan
from .phantom_tumour import TUMOUR_SLICES, Tumour, grow_tumour


def make_subject(
    seed: int, number: int, split: str, healthy: bool = False
) -> tuple[dict[str, np.ndarray], Anatomy, Tumour]:
    """Generate a subject: its [240, 240, 155] volumes by kind (int16 modalities, uint8 `seg`), anatomy and tumour.

    The tumour of a healthy subject has no compartments, and its `seg` is 0 everywhere.
    """
    rng = np.random.default_rng([seed, number])
    anatomy, tumour = make_anatomy(rng), Tumour({}, {}, np.empty(0))
    if not healthy:
        anatomy, tumour = grow_tumour(rng, anatomy, TUMOUR_SLICES[split])
    shared_bias = bias_field(rng, anatomy, rng.uniform(*BIAS_FIELD))
    voxels = {modality: scan(rng, anatomy, tumour, modality, shared_bias) for modality in TISSUE_CONTRAST}
    voxels["seg"] = np.zeros(len(anatomy.coords), np.uint8)
    for label, share in tumour.shares.items():
        voxels["seg"][share > 0.5] = label

    volumes = {kind: np.zeros(SHAPE, values.dtype, order="F") for kind, values in voxels.items()}
    for kind, values in voxels.items():
        volumes[kind][tuple(anatomy.coords.T)] = values
    return volumes, anatomy, tumour
