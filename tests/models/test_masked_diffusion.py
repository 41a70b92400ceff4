"""The masked conditional diffusion: what the network is shown, what it must not see, and where noise comes from."""

import itertools
import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.unet import UNetModel
from models.masked_diffusion import (
    MaskedDiffusionTranslator,
    draw_masked_diffusion,
    masked_condition,
    masked_diffusion_losses,
)
from models.masks import Band, band_mask

SIZE, WIDTH, STRIDE = 16, 4, 2
STEPS = 40
BANDS = [Band("horizontal", 2), Band("vertical", 2), Band("horizontal", 14)]


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def shown(monkeypatch) -> list:
    """Fills with the input and the timesteps of every evaluation of a UNet, below everything that wraps it."""
    calls, original = [], UNetModel.forward

    def forward(self, x, timesteps=None):
        calls.append((x.detach().clone(), timesteps))
        return original(self, x, timesteps)

    monkeypatch.setattr(UNetModel, "forward", forward)
    return calls


@pytest.fixture
def losses_of(make_diffusion, masked_unet):
    """The training losses of some slices."""

    def compute(image, target, sampler=None, seed=0, step=0, model=masked_unet):
        diffusion = make_diffusion(STEPS)
        process = {"schedule_sampler": sampler or create_named_schedule_sampler("uniform", diffusion)}
        where = {"image_size": SIZE, "band_width": WIDTH, "band_stride": STRIDE}
        draws = draw_masked_diffusion(step, seed=seed, batch_size=len(image), **where, **process)
        return masked_diffusion_losses(model, image, target, draws, diffusion=diffusion, **process)

    return compute


@pytest.fixture
def make_translator(make_diffusion, masked_unet):
    def make(model=masked_unet, **kwargs):
        options = {"image_size": SIZE, "band_width": WIDTH, "seed": 0, "use_ddim": True, "eta": 0.0}
        diffusion = make_diffusion(STEPS, use_timesteps=[0, 13, 26, 39])
        return MaskedDiffusionTranslator(model, diffusion, **{**options, **kwargs})

    return make


# ----------------------------------------------------------------------------------------------------------
# The condition


def test_the_condition_is_the_image_outside_and_noise_inside(normal):
    image, noise, mask = normal(2, 1, 6, 6), normal(2, 1, 6, 6), normal(2, 1, 6, 6) > 0.3
    condition = masked_condition(image, mask, noise)
    assert torch.equal(condition[mask], noise[mask])
    assert torch.equal(condition[~mask], image[~mask])


def test_the_network_is_shown_x_t_and_the_condition(masked_unet, shown, normal):
    x_t, condition, t = normal(2, 1, 8, 8), normal(2, 1, 8, 8), torch.tensor([3, 20])
    out = masked_unet(x_t, t, condition=condition)
    ((x, timesteps),) = shown
    assert out.shape == (2, 1, 8, 8)
    assert torch.equal(x[:, :1], x_t)
    assert torch.equal(x[:, 1:], condition)
    assert timesteps is t


# ----------------------------------------------------------------------------------------------------------
# Training


def hidden_in(shown, image):
    """Where the condition that the network was shown is not the image: bool [N, H, W]."""
    ((x, _),) = shown
    return (x[:, 1] != image[:, 0]).numpy()


def test_training_hides_one_band_of_each_sample(losses_of, shown, normal):
    image = normal(24, 1, SIZE, SIZE)
    losses_of(image, normal(24, 1, SIZE, SIZE))
    found = set()
    for mask in hidden_in(shown, image):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        horizontal = len(columns) == SIZE
        places, along = (rows, columns) if horizontal else (columns, rows)
        np.testing.assert_array_equal(along, np.arange(SIZE))
        np.testing.assert_array_equal(places, np.arange(places[0], min(places[0] + WIDTH, SIZE)))
        assert mask.sum() == SIZE * len(places)
        assert places[0] % STRIDE == 0
        found.add((horizontal, places[0]))
    assert len(found) > 8  # of 16, in one batch
    assert {horizontal for horizontal, _ in found} == {True, False}


def test_training_noise_is_standard_and_fresh_for_every_sample(losses_of, shown, normal):
    n = 400
    image = torch.full((n, 1, SIZE, SIZE), 50.0)
    losses_of(image, torch.zeros_like(image))
    ((x, t),) = shown
    hidden = x[:, 1] != 50.0
    under_bands = x[:, 1][hidden]
    # x_t of the target 0 is noise times √(1 − ᾱ_t).
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("linear", STEPS))[t.numpy()]
    noise = x[:, 0] / torch.from_numpy(np.sqrt(1 - alpha_bar)).float()[:, None, None]
    for draws in (under_bands, noise):
        assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())
        assert abs(draws.var().item() - 1) < 5 * math.sqrt(2 / draws.numel())
        assert draws.unique().numel() > 0.99 * draws.numel()  # no two samples share their noise
    both = torch.stack([under_bands, noise[hidden]])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(both.shape[1])


def test_training_losses_are_those_of_the_diffusion(losses_of, shown, normal):
    image, target = normal(3, 1, SIZE, SIZE), normal(3, 1, SIZE, SIZE)
    outputs = []

    def model(x_t, t, condition):
        outputs.append(0.5 * x_t + condition)
        return outputs[-1]

    losses = losses_of(image, target, model=model)
    expected = ((outputs[0] - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)


def test_training_is_keyed_by_seed_and_step(losses_of, normal):
    image, target = normal(4, 1, SIZE, SIZE), normal(4, 1, SIZE, SIZE)
    torch.manual_seed(0)
    first = losses_of(image, target, seed=3, step=7)
    torch.manual_seed(1)
    assert torch.equal(losses_of(image, target, seed=3, step=7), first)
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not torch.allclose(losses_of(image, target, seed=seed, step=step), first, rtol=1e-3)


def test_training_leaves_the_global_generator_alone(losses_of, normal):
    before = torch.get_rng_state()
    losses_of(normal(2, 1, SIZE, SIZE), normal(2, 1, SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_does_not_see_under_the_band(losses_of, shown, normal):
    image, target = normal(4, 1, SIZE, SIZE), normal(4, 1, SIZE, SIZE)
    losses = losses_of(image, target)
    hidden = torch.from_numpy(hidden_in(shown, image))[:, None]
    assert torch.equal(losses_of(image + 100 * hidden, target), losses)
    assert not torch.allclose(losses_of(image + 0.5 * ~hidden, target), losses, rtol=1e-3)


class StandInSampler:
    """Timesteps and weights that are known; remembers what it is told."""

    def __init__(self):
        self.told = []

    def sample(self, batch_size, generator):
        return torch.arange(batch_size), torch.arange(1.0, batch_size + 1)

    def update(self, t, losses):
        self.told.append((t, losses))


def test_the_schedule_sampler_draws_weights_and_learns(losses_of, shown, normal):
    sampler = StandInSampler()
    losses = losses_of(normal(3, 1, SIZE, SIZE), normal(3, 1, SIZE, SIZE), sampler=sampler)
    ((t, told),) = sampler.told
    assert t.tolist() == shown[0][1].tolist() == [0, 1, 2]
    torch.testing.assert_close(losses, told * torch.tensor([1.0, 2.0, 3.0]))
    assert losses.requires_grad
    assert not told.requires_grad


def test_all_weights_get_a_gradient(losses_of, masked_unet, normal):
    losses_of(normal(4, 1, SIZE, SIZE), normal(4, 1, SIZE, SIZE)).mean().backward()
    assert all(parameter.grad.abs().max() > 1e-7 for parameter in masked_unet.parameters())


# ----------------------------------------------------------------------------------------------------------
# Sampling


def test_masks_of_the_translator_are_those_of_its_bands(make_translator):
    masks = make_translator().mask(BANDS)
    assert masks.shape == (3, 1, SIZE, SIZE)
    assert all(torch.equal(mask, band_mask(band, SIZE, WIDTH)) for mask, band in zip(masks, BANDS, strict=True))


@pytest.mark.parametrize("use_ddim", [True, False])
def test_the_condition_is_made_once_a_sample(make_translator, normal, monkeypatch, use_ddim):
    """Every step is given the same tensor: noise under the band, the image elsewhere."""
    made, given = [], []

    def make(image, mask, noise):
        made.append((mask, noise, masked_condition(image, mask, noise)))
        return made[-1][2]

    def model(x, t, condition):
        given.append(condition)
        return x * 0

    monkeypatch.setattr("models.masked_diffusion.masked_condition", make)
    image, translator = normal(3, 1, SIZE, SIZE), make_translator(model=model, use_ddim=use_ddim)
    translator.sample(image, BANDS)
    ((mask, noise, condition),) = made
    assert len(given) == 4
    assert all(one is condition for one in given)
    assert torch.equal(mask, translator.mask(BANDS))
    assert torch.equal(condition[mask], noise[mask])
    assert torch.equal(condition[~mask], image[~mask])


@pytest.mark.parametrize("use_ddim", [True, False])
def test_the_condition_is_held_over_all_steps(make_translator, shown, normal, use_ddim):
    image = normal(3, 1, SIZE, SIZE)
    make_translator(use_ddim=use_ddim).sample(image, BANDS)
    assert [t.tolist() for _, t in shown] == [[t] * 3 for t in (39, 26, 13, 0)]
    conditions = [x[:, 1] for x, _ in shown]
    assert all(torch.equal(condition, conditions[0]) for condition in conditions)
    hidden = torch.cat([band_mask(band, SIZE, WIDTH) for band in BANDS])
    assert torch.equal(conditions[0][~hidden], image[:, 0][~hidden])
    assert not (conditions[0] == image[:, 0])[hidden].any()
    assert conditions[0][hidden].std().item() == pytest.approx(1, abs=0.25)


def test_noise_is_that_of_the_band_whatever_the_batch(make_translator, shown, normal):
    translator, images = make_translator(), normal(4, 1, SIZE, SIZE)
    a, b = BANDS[:2]
    translator.sample(images, [a, b, a, b])
    translator.sample(images[3:], [a])
    together, alone = shown[0][0], shown[4][0]
    hidden = {band: band_mask(band, SIZE, WIDTH)[0] for band in (a, b)}
    for i, (x_last, condition) in enumerate(together):
        same, other = (0, 1) if i % 2 == 0 else (1, 0)
        band = (a, b)[i % 2]
        assert torch.equal(x_last, together[same, 0])
        assert torch.equal(condition[hidden[band]], together[same, 1][hidden[band]])
        assert not torch.equal(x_last, together[other, 0])
        assert not torch.equal(x_last[hidden[band]], condition[hidden[band]])
    assert torch.equal(alone[0, 0], together[0, 0])
    assert torch.equal(alone[0, 1][hidden[a]], together[0, 1][hidden[a]])
    assert not torch.equal(shown[0][0], shown[1][0])  # x_t moves on


def test_noise_is_standard_normal(make_translator):
    bands = [Band(direction, start) for direction in ("horizontal", "vertical") for start in range(SIZE)]
    seen = []

    def model(x, t, condition):
        seen.append((x, condition))
        return x * 0

    translator = make_translator(model=model)
    translator.sample(torch.zeros(32, 1, SIZE, SIZE), bands)
    hidden = translator.mask(bands)
    x_last, noise = (drawn[hidden] for drawn in seen[0])
    assert not seen[0][1][~hidden].any()
    for draws in (x_last, noise):
        assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())
        assert abs(draws.var().item() - 1) < 5 * math.sqrt(2 / draws.numel())
    assert abs(torch.corrcoef(torch.stack([x_last, noise]))[0, 1]) < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize("use_ddim", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_depend_on_the_seed_and_the_band_alone(make_translator, normal, use_ddim, eta):
    image = normal(1, 1, SIZE, SIZE).repeat(3, 1, 1, 1)
    samples = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        samples.append(make_translator(use_ddim=use_ddim, eta=eta).sample(image, BANDS))
    assert torch.equal(*samples)
    alone = torch.cat([make_translator(use_ddim=use_ddim, eta=eta).sample(image[:1], [band]) for band in BANDS])
    torch.testing.assert_close(samples[0], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(samples[0][0], samples[0][1], atol=1e-2)
    other_seed = make_translator(use_ddim=use_ddim, eta=eta, seed=1).sample(image, BANDS)
    assert not torch.allclose(other_seed, samples[0], atol=1e-2)


def test_ancestral_and_ddim_sampling_differ(make_translator, normal):
    image = normal(3, 1, SIZE, SIZE)
    ways = ({"use_ddim": True}, {"use_ddim": True, "eta": 1.0}, {"use_ddim": False})
    samples = [make_translator(**way).sample(image, BANDS) for way in ways]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(samples[i], samples[j], atol=1e-2)


def test_ancestral_noise_is_fresh_in_every_step(make_translator):
    """With a network that says 0 and the large variance, x_{t-1} − c x_t is what step t added."""
    seen = []
    translator = make_translator(model=lambda x, t, **condition: seen.append(x) or x * 0, use_ddim=False)
    translator.sample(torch.zeros(3, 1, SIZE, SIZE), BANDS)
    draws = torch.stack([x.flatten() for x in seen])
    added = [draws[0]]
    for before, after in itertools.pairwise(draws):
        slope = (before @ after) / (before @ before)
        added.append(after - slope * before)
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / math.sqrt(draws.shape[1])
    assert all(noise.std() > 0.1 for noise in added)


@pytest.mark.parametrize("use_ddim", [True, False])
def test_sampling_does_not_see_under_the_band(make_translator, normal, use_ddim):
    image, translator = normal(3, 1, SIZE, SIZE), make_translator(use_ddim=use_ddim)
    hidden, sample = translator.mask(BANDS), translator.sample(image, BANDS)
    assert torch.equal(translator.sample(image + 100 * hidden, BANDS), sample)
    outside = translator.sample(image + 0.5 * ~hidden, BANDS)
    assert not torch.allclose(outside, sample, atol=1e-2)
    assert sample[hidden].std() > 0.01


def test_the_predicted_x_0_is_not_clipped(make_translator, normal):
    """Normalised slices reach from −3 to beyond 3: clipping to [−1, 1] would leave nothing of them."""
    image = normal(3, 1, SIZE, SIZE)
    sample = make_translator(model=lambda x, t, condition: x * 0 + 5.0).sample(image, BANDS)
    torch.testing.assert_close(sample, torch.full_like(image, 5.0))
