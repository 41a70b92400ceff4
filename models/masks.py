"""The bands that hide a part of the input (Liang et al. 2023, section 2.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """A full-width (`horizontal`) or full-height (`vertical`) band that begins at row or column `start`."""

    direction: str
    start: int


def sweep(image_size: int, stride: int) -> list[Band]:
    """Return all bands of the test-time sweep: starts 0, stride, 2·stride, … below image_size, in both directions."""
    return [Band(d, start) for d in ("horizontal", "vertical") for start in range(0, image_size, stride)]


def band_mask(band: Band, image_size: int, width: int) -> Tensor:
    """Return the pixels that `band` hides, bool [1, image_size, image_size]. The image's border cuts the band."""
    mask = torch.zeros(1, image_size, image_size, dtype=torch.bool)
    hidden = slice(band.start, band.start + width)
    if band.direction == "horizontal":
        mask[:, hidden, :] = True
    else:
        mask[:, :, hidden] = True
    return mask


def band_masks(bands: Sequence[Band], image_size: int, width: int) -> Tensor:
    """Return the pixels that each of N bands hides, bool [N, 1, image_size, image_size]."""
    return torch.stack([band_mask(band, image_size, width) for band in bands])


def random_bands(n: int, image_size: int, stride: int, generator: torch.Generator) -> list[Band]:
    """Draw n bands uniformly from the sweep, one for each sample of a training batch."""
    bands = sweep(image_size, stride)
    return [bands[i] for i in torch.randint(len(bands), (n,), generator=generator).tolist()]
