"""Display window of normalised slices. Separate from figures.py so that training need not import matplotlib."""

import numpy as np

# Normalised intensities shown as black and white. A tenth of the brain, and most tumours, are above 3.
WINDOW = (-3.0, 5.0)


def to_grey(image: np.ndarray) -> np.ndarray:
    """Map a slice [H, W] from the window to grey levels in [0, 1], clipped, and transpose it to [W, H], front up."""
    low, high = WINDOW
    return np.clip((image - low) / (high - low), 0, 1).T


def side_by_side(*images: np.ndarray) -> np.ndarray:
    """Concatenate equally sized slices in a row, as grey levels in [0, 1], for TensorBoard."""
    return np.concatenate([to_grey(image) for image in images], axis=1)
