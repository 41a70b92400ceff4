"""How normalised slices are looked at; apart from the figures, whose imports training need not wait for."""

import numpy as np

# Normalised intensities shown as black and white. A tenth of the brain, and most tumours, lie above 3.
WINDOW = (-3.0, 5.0)


def to_grey(image: np.ndarray) -> np.ndarray:
    """A slice as it is looked at: the window mapped to 0 … 1 and clipped, [H, W] turned front-up to [W, H]."""
    low, high = WINDOW
    return np.clip((image - low) / (high - low), 0, 1).T


def side_by_side(*images: np.ndarray) -> np.ndarray:
    """Slices of one size in a row, in [0, 1], for TensorBoard."""
    return np.concatenate([to_grey(image) for image in images], axis=1)
