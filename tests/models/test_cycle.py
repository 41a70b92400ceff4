"""The cycle, compared with slow references that process one slice and band at a time and average at the end."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.cycle import Cycle, anomaly_score, error_floor, modality_cycle
from models.masked_diffusion import MaskedDiffusionTranslator
from models.masks import sweep
from models.mmccd import mmccd, slices_and_bands
from utils.recording import RecordedPasses

SIZE, WIDTH, STRIDE = 16, 4, 2
BANDS = sweep(SIZE, STRIDE)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def brainmask(small_brains) -> torch.Tensor:
    return small_brains


@pytest.fixture
def forward(masked_unet, make_diffusion) -> MaskedDiffusionTranslator:
    return MaskedDiffusionTranslator(
        masked_unet,
        make_diffusion(40, use_timesteps=[0, 20, 39]),
        image_size=SIZE,
        band_width=WIDTH,
        seed=0,
        use_ddim=True,
        eta=0.0,
    )


@pytest.fixture
def score(image, brainmask, forward, translator):
    """Compute MMCCD, by default of the three slices."""

    def compute(image=image, brainmask=brainmask, batch_size=7, **kwargs):
        return mmccd(image, brainmask, forward, translator, **{"bands": BANDS, "batch_size": batch_size, **kwargs})

    return compute


def assert_same(got, want):
    """Compare to 1e-5 of the largest value; the last digits of float32 sums depend on the batch."""
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@torch.no_grad()
def slow_mmccd(image, brainmask, forward, backward, skip):
    """Return error, translation, reconstruction, variance [4, N, H, W]; `skip` leaves out bands that hide no brain."""
    results = np.empty((4, len(image), SIZE, SIZE))
    for i in range(len(image)):
        stacks = np.full((3, len(BANDS), SIZE, SIZE), np.nan)
        for j, band in enumerate(BANDS):
            hidden = np.zeros((SIZE, SIZE), dtype=bool)
            if band.direction == "horizontal":
                hidden[band.start : band.start + WIDTH] = True
            else:
                hidden[:, band.start : band.start + WIDTH] = True
            if skip and not (hidden & brainmask[i, 0].numpy()).any():
                continue
            translation = forward.sample(image[i : i + 1], [band])
            reconstruction = backward(translation)
            error = (image[i : i + 1] - reconstruction) ** 2
            for stack, picture in zip(stacks, (error, translation, reconstruction), strict=True):
                stack[j] = np.where(hidden, picture[0, 0].numpy(), np.nan)
        covered = ~np.isnan(stacks[0]).all(0)
        background = np.stack([np.zeros((SIZE, SIZE)), image[i, 0].numpy(), image[i, 0].numpy()])
        means = np.nansum(stacks, axis=1) / np.maximum((~np.isnan(stacks)).sum(1), 1)
        results[:3, i] = np.where(covered, means, background)
        variance = np.nansum((stacks[2] - means[2]) ** 2, axis=0) / np.maximum((~np.isnan(stacks[2])).sum(0), 1)
        results[3, i] = np.where(covered, variance, 0)
    return results


# ----------------------------------------------------------------------------------------------------------
# Cyclic UNet


def test_cyclic_unet_matches_the_formula(image):
    cycle = modality_cycle(image, lambda a: 2 * a + 1, lambda b: b / 3, batch_size=2)
    torch.testing.assert_close(cycle.translation, 2 * image + 1)
    torch.testing.assert_close(cycle.reconstruction, (2 * image + 1) / 3)
    torch.testing.assert_close(cycle.error, ((image - 1) / 3) ** 2)


def test_cyclic_unet_with_networks(image, translator, randomise):
    cycle = modality_cycle(image, translator, translator, batch_size=2)
    with torch.no_grad():
        expected = (image - translator(translator(image))) ** 2
    assert_same(cycle.error, expected)
    assert not cycle.error.requires_grad
    assert cycle.error.min() >= 0


def test_perfect_cycle_has_no_error(image):
    assert not modality_cycle(image, torch.neg, torch.neg, batch_size=2).error.any()


# ----------------------------------------------------------------------------------------------------------
# MMCCD


def test_mmccd_matches_the_slow_reference(score, image, brainmask, forward, translator):
    expected = slow_mmccd(image, brainmask, forward, translator, skip=True)
    cycle = score()
    assert cycle.error.shape == image.shape
    for got, want in zip(cycle, expected, strict=True):
        assert_same(got[:, 0].numpy(), want)
    assert expected[0].std() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("kind", ["errors", "reconstructions", "standardised"])
def test_scores_follow_from_mean_and_variance_of_the_draws(score, image, brainmask, forward, translator, kind):
    """Compare with draws made one slice and one band at a time, all of them kept."""
    cycle, c = score(), 0.3
    for i in range(len(image)):
        hidden = (
            forward.mask(BANDS)[:, 0] & (forward.mask(BANDS)[:, 0] & brainmask[i, 0]).flatten(1).any(1)[:, None, None]
        )
        with torch.no_grad():
            draws = torch.stack([translator(forward.sample(image[i : i + 1], [band]))[0, 0] for band in BANDS])
        draws = torch.where(hidden, draws, torch.nan).double()
        mean, variance = draws.nanmean(0), (draws.square().nanmean(0) - draws.nanmean(0).square())
        expected = {
            "errors": (image[i, 0] - draws).square().nanmean(0),
            "reconstructions": (image[i, 0] - mean).square(),
            "standardised": (image[i, 0] - mean).square() / (variance + c),
        }[kind]
        got = anomaly_score(image, cycle, kind, c)[i, 0]
        covered = hidden.any(0)
        assert_same(got[covered], expected[covered])
        assert variance[covered].max() > 0.1


def test_variance_does_not_depend_on_the_image(score, image):
    """A large error costs no precision."""
    near, far = score().variance, score(reference=image + 100).variance
    covered = near > 0
    assert covered.any()
    assert_same(far[covered], near[covered])


def test_single_draw_has_no_variance(image):
    cycle = modality_cycle(image, lambda a: 2 * a + 1, lambda b: b / 3, batch_size=2)
    assert not cycle.variance.any()
    assert torch.equal(anomaly_score(image, cycle, "errors"), cycle.error)


def test_standardised_score_of_healthy_tissue_has_mean_1():
    """Around a common mean, draws have variance v and A has v + c. Lesions do not affect c."""
    generator = torch.Generator().manual_seed(0)
    mean, noise, *draws = torch.randn(42, 4, 1, 64, 64, generator=generator)
    variance, c = torch.rand(4, 1, 64, 64, generator=generator), 0.5
    image = mean + (variance + c).sqrt() * noise
    draws = mean + variance.sqrt() * torch.stack(draws)
    healthy = torch.ones_like(image, dtype=torch.bool)
    healthy[:, :, :8] = False
    image[~healthy] += 10
    cycle = Cycle((image - draws).square().mean(0), mean, draws.mean(0), draws.var(0, correction=0))
    found = error_floor(image, cycle, healthy)
    assert found == pytest.approx(c, abs=0.08)
    assert anomaly_score(image, cycle, "standardised", found)[healthy].mean() == pytest.approx(1, abs=0.1)
    assert anomaly_score(image, cycle, "standardised", found)[~healthy].mean() > 20
    assert error_floor(image, cycle, torch.zeros_like(healthy)) == 1
    perfect = cycle._replace(error=0 * image, reconstruction=image)
    assert 0 < error_floor(image, perfect, healthy) < 1e-5


def test_skipped_bands_change_nothing_inside_the_brain(score, image, brainmask, forward, translator):
    everything = slow_mmccd(image, brainmask, forward, translator, skip=False)
    sampled = []
    original = forward.sample
    forward.sample = lambda image, bands: sampled.extend(bands) or original(image, bands)
    cycle = score()
    assert len(sampled) < 3 * len(BANDS)
    inside = brainmask[:, 0].numpy()
    for got, want in zip(cycle, everything, strict=True):
        assert_same(got[:, 0].numpy()[inside], want[inside])


def test_only_bands_that_hide_brain_are_sampled(score, brainmask, forward):
    sampled = []
    original = forward.sample
    forward.sample = lambda image, bands: sampled.extend(bands) or original(image, bands)
    score()
    expected = [
        band
        for mask in brainmask
        for band, hidden in zip(BANDS, forward.mask(BANDS), strict=True)
        if (mask & hidden).any()
    ]
    assert sampled == expected


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_the_batch_size_does_not_matter(score, batch_size):
    for got, want in zip(score(batch_size=batch_size), score(batch_size=7), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_recorded_passes_of_one_shape_do_not_change_the_scores(
    image, brainmask, forward, translator, score, graphs, batch_size
):
    expected = score()
    forward.model = RecordedPasses(forward.model)
    found = mmccd(image, brainmask, forward, RecordedPasses(translator), bands=BANDS, batch_size=batch_size)
    assert forward.model.size == batch_size
    assert len(graphs) == 1 + (batch_size == 5)  # fewer than 5 passes backward are not recorded
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_the_order_of_slices_does_not_matter(score, image, brainmask):
    order = [2, 0, 1]
    for got, want in zip(score(image[order], brainmask[order]), score(), strict=True):
        assert_same(got, want[order])


def test_slices_do_not_depend_on_each_other(score, image, brainmask):
    for got, want in zip(score(image[1:2], brainmask[1:2]), score(), strict=True):
        assert_same(got, want[1:2])


def test_slice_without_brain_has_no_error(score, image, brainmask):
    brainmask = brainmask.clone()
    brainmask[1] = False
    cycle = score(brainmask=brainmask)
    assert not cycle.error[1].any()
    assert torch.equal(cycle.translation[1], image[1])
    assert torch.equal(cycle.reconstruction[1], image[1])
    assert_same(cycle.error[0], score().error[0])


def test_batch_without_brain_has_no_error(score, image, brainmask):
    assert not score(brainmask=torch.zeros_like(brainmask)).error.any()


def test_pixels_that_no_band_hid_equal_the_image(score, image, brainmask):
    """The second brain is in rows 6 … 8 and columns 10 … 11, and no band that hides it reaches the corner."""
    cycle = score()
    assert not cycle.error[1, 0, :2, :2].any()
    assert torch.equal(cycle.translation[1, 0, :2, :2], image[1, 0, :2, :2])
    assert torch.equal(cycle.reconstruction[1, 0, :2, :2], image[1, 0, :2, :2])


def test_score_is_the_squared_image_if_the_cycle_returns_0(image, brainmask, forward):
    """The forward translator returns 0 and the backward translator keeps it, so the score is A²."""
    forward.sample = lambda image, bands: torch.zeros_like(image)
    cycle = mmccd(image, brainmask, forward, lambda b: b, bands=BANDS, batch_size=7)
    torch.testing.assert_close(cycle.error[brainmask], image[brainmask] ** 2)


def test_progress_is_called_after_each_batch(score, brainmask, forward):
    sizes = []
    watched = score(progress=sizes.append).error
    assert sum(sizes) == len(slices_and_bands(brainmask, forward, BANDS))
    assert sizes[:-1] == [7] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= 7
    assert torch.equal(watched, score().error)


# ----------------------------------------------------------------------------------------------------------
# Memory


class OutOfMemoryOnce(TorchDispatchMode):
    """Counts operations, and runs out of memory once, at operation number `at`."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.count, self.refused = at, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            self.refused = func
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["cyclic_unet", "mmccd"])
def test_batch_counts_once_wherever_the_memory_runs_out(image, brainmask, forward, method):
    """A batch that is retried in halves leaves nothing of the failed attempt."""
    forward.sample = lambda image, bands: 2 * image + 1

    def score(mode):
        with mode, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if method == "cyclic_unet":
                cycle = modality_cycle(image, lambda a: 2 * a + 1, lambda b: b / 3, batch_size=3)
            else:
                cycle = mmccd(image, brainmask, forward, lambda b: b / 3, bands=BANDS, batch_size=1000)
        return cycle, [str(warning.message) for warning in warned]

    undisturbed, _ = score(counter := OutOfMemoryOnce(at=0))
    retried = []
    for at in range(1, counter.count + 1):
        mode = OutOfMemoryOnce(at)
        try:
            cycle, warned = score(mode)
        except torch.OutOfMemoryError:  # before the first batch or after the last, where nothing is retried
            continue
        assert len(warned) == 1
        assert "does not fit" in warned[0]
        retried.append(mode.refused)
        for got, want in zip(cycle, undisturbed, strict=True):
            assert_same(got, want)
    assert len(retried) >= 5
    assert (torch.ops.aten.index_add_.default in retried) == (method == "mmccd")
