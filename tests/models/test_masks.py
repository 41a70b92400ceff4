"""Bands: the paper's sweep, masks compared with brute force, and random bands for training."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from models.masks import Band, band_mask, random_bands, sweep


def hidden_pixels(band: Band, image_size: int, width: int) -> np.ndarray:
    """Compute the mask pixel by pixel."""
    mask = np.zeros((image_size, image_size), dtype=bool)
    for row in range(image_size):
        for column in range(image_size):
            place = row if band.direction == "horizontal" else column
            mask[row, column] = band.start <= place < band.start + width
    return mask


def test_sweep_of_the_paper():
    bands = sweep(128, 2)
    assert len(bands) == len(set(bands)) == 128
    for direction in ("horizontal", "vertical"):
        assert [band.start for band in bands if band.direction == direction] == list(range(0, 127, 2))


def test_bands_of_the_paper_are_16_px_wide_unless_cut_at_the_border():
    for band in sweep(128, 2):
        mask = band_mask(band, 128, 16)[0]
        across, along = (1, 0) if band.direction == "horizontal" else (0, 1)
        thickness = mask.any(across).sum().item()
        assert mask.any(along).all()  # full width or full height
        assert mask.sum() == 128 * thickness
        assert thickness == min(16, 128 - band.start)


@pytest.mark.parametrize(("image_size", "stride", "width"), [(16, 2, 4), (12, 3, 3), (10, 4, 5), (5, 1, 5)])
def test_masks_match_brute_force(image_size, stride, width):
    for band in sweep(image_size, stride):
        mask = band_mask(band, image_size, width)
        assert mask.dtype == torch.bool
        assert mask.shape == (1, image_size, image_size)
        np.testing.assert_array_equal(mask[0].numpy(), hidden_pixels(band, image_size, width))


@pytest.mark.parametrize(("image_size", "stride", "width"), [(128, 2, 16), (64, 4, 8), (16, 4, 4), (10, 4, 5)])
def test_every_pixel_is_covered_in_both_directions(image_size, stride, width):
    bands = sweep(image_size, stride)
    for direction in ("horizontal", "vertical"):
        masks = [band_mask(band, image_size, width) for band in bands if band.direction == direction]
        assert torch.stack(masks).any(0).all()


def test_bands_per_pixel_in_the_sweep_of_the_paper():
    coverage = sum(band_mask(band, 128, 16).int() for band in sweep(128, 2))[0]
    assert coverage[20:, 20:].unique().tolist() == [16]  # 8 bands in either direction
    assert coverage[0, 0] == 2
    assert coverage[0, 64] == 9


def test_random_bands_are_uniform_over_the_sweep():
    bands = random_bands(20_000, 32, 2, torch.Generator().manual_seed(0))
    counts = Counter(bands)
    assert set(counts) == set(sweep(32, 2))
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_random_bands_depend_only_on_the_generator():
    draws = [random_bands(20, 128, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) > 10


def test_random_bands_advance_the_generator():
    generator = torch.Generator().manual_seed(0)
    assert random_bands(20, 128, 2, generator) != random_bands(20, 128, 2, generator)
