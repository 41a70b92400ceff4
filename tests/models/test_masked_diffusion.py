"""Masked conditional diffusion: inputs of the network, independence of the hidden band, and sources of noise."""

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
def unet_calls(monkeypatch) -> list:
    """Record the input and the timesteps of every UNet call, below all wrappers."""
    calls, original = [], UNetModel.forward

    def forward(self, x, timesteps=None):
        calls.append((x.detach().clone(), timesteps))
        return original(self, x, timesteps)

    monkeypatch.setattr(UNetModel, "forward", forward)
    return calls


@pytest.fixture
def losses_of(make_diffusion, masked_unet):
    """Compute the training losses of a batch of slices."""

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


def test_condition_is_noise_in_the_mask_and_the_image_elsewhere(normal):
    image, noise, mask = normal(2, 1, 6, 6), normal(2, 1, 6, 6), normal(2, 1, 6, 6) > 0.3
    condition = masked_condition(image, mask, noise)
    assert torch.equal(condition[mask], noise[mask])
    assert torch.equal(condition[~mask], image[~mask])


def test_network_input_is_x_t_and_the_condition(masked_unet, unet_calls, normal):
    x_t, condition, t = normal(2, 1, 8, 8), normal(2, 1, 8, 8), torch.tensor([3, 20])
    out = masked_unet(x_t, t, condition=condition)
    ((x, timesteps),) = unet_calls
    assert out.shape == (2, 1, 8, 8)
    assert torch.equal(x[:, :1], x_t)
    assert torch.equal(x[:, 1:], condition)
    assert timesteps is t


# ----------------------------------------------------------------------------------------------------------
# Training


def hidden_in(unet_calls, image):
    """Return where the condition in the network's input differs from the image, bool [N, H, W]."""
    ((x, _),) = unet_calls
    return (x[:, 1] != image[:, 0]).numpy()


def test_training_hides_one_band_per_sample(losses_of, unet_calls, normal):
    image = normal(24, 1, SIZE, SIZE)
    losses_of(image, normal(24, 1, SIZE, SIZE))
    found = set()
    for mask in hidden_in(unet_calls, image):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        horizontal = len(columns) == SIZE
        across, along = (rows, columns) if horizontal else (columns, rows)
        np.testing.assert_array_equal(along, np.arange(SIZE))
        np.testing.assert_array_equal(across, np.arange(across[0], min(across[0] + WIDTH, SIZE)))
        assert mask.sum() == SIZE * len(across)
        assert across[0] % STRIDE == 0
        found.add((horizontal, across[0]))
    assert len(found) > 8  # of 16, in one batch
    assert {horizontal for horizontal, _ in found} == {True, False}


def test_training_noise_is_standard_normal_and_different_for_every_sample(losses_of, unet_calls, normal):
    n = 400
    image = torch.full((n, 1, SIZE, SIZE), 50.0)
    losses_of(image, torch.zeros_like(image))
    ((x, t),) = unet_calls
    hidden = x[:, 1] != 50.0
    under_bands = x[:, 1][hidden]
    # For a target of 0, x_t is noise times √(1 − ᾱ_t).
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("linear", STEPS))[t.numpy()]
    noise = x[:, 0] / torch.from_numpy(np.sqrt(1 - alpha_bar)).float()[:, None, None]
    for draws in (under_bands, noise):
        assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())
        assert abs(draws.var().item() - 1) < 5 * math.sqrt(2 / draws.numel())
        assert draws.unique().numel() > 0.99 * draws.numel()  # no two samples share their noise
    both = torch.stack([under_bands, noise[hidden]])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(both.shape[1])


def test_training_losses_are_the_squared_error_of_x_0(losses_of, unet_calls, normal):
    image, target = normal(3, 1, SIZE, SIZE), normal(3, 1, SIZE, SIZE)
    outputs = []

    def model(x_t, t, condition):
        outputs.append(0.5 * x_t + condition)
        return outputs[-1]

    losses = losses_of(image, target, model=model)
    expected = ((outputs[0] - target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)


def test_training_depends_on_seed_and_step(losses_of, normal):
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


def test_training_does_not_depend_on_the_hidden_band(losses_of, unet_calls, normal):
    image, target = normal(4, 1, SIZE, SIZE), normal(4, 1, SIZE, SIZE)
    losses = losses_of(image, target)
    hidden = torch.from_numpy(hidden_in(unet_calls, image))[:, None]
    assert torch.equal(losses_of(image + 100 * hidden, target), losses)
    assert not torch.allclose(losses_of(image + 0.5 * ~hidden, target), losses, rtol=1e-3)


class FakeSampler:
    """Returns fixed timesteps and weights, and records its updates."""

    def __init__(self):
        self.updates = []

    def sample(self, batch_size, generator):
        return torch.arange(batch_size), torch.arange(1.0, batch_size + 1)

    def update(self, t, losses):
        self.updates.append((t, losses))


def test_schedule_sampler_weights_the_losses_and_is_updated(losses_of, unet_calls, normal):
    sampler = FakeSampler()
    losses = losses_of(normal(3, 1, SIZE, SIZE), normal(3, 1, SIZE, SIZE), sampler=sampler)
    ((t, recorded),) = sampler.updates
    assert t.tolist() == unet_calls[0][1].tolist() == [0, 1, 2]
    torch.testing.assert_close(losses, recorded * torch.tensor([1.0, 2.0, 3.0]))
    assert losses.requires_grad
    assert not recorded.requires_grad


def test_all_weights_get_a_gradient(losses_of, masked_unet, normal):
    losses_of(normal(4, 1, SIZE, SIZE), normal(4, 1, SIZE, SIZE)).mean().backward()
    assert all(parameter.grad.abs().max() > 1e-7 for parameter in masked_unet.parameters())


# ----------------------------------------------------------------------------------------------------------
# Sampling


def test_translator_masks_match_the_bands(make_translator):
    masks = make_translator().mask(BANDS)
    assert masks.shape == (3, 1, SIZE, SIZE)
    assert all(torch.equal(mask, band_mask(band, SIZE, WIDTH)) for mask, band in zip(masks, BANDS, strict=True))


@pytest.mark.parametrize("use_ddim", [True, False])
def test_condition_is_made_once_per_sample(make_translator, normal, monkeypatch, use_ddim):
    """Every step gets the same tensor: noise under the band, the image elsewhere."""
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
def test_condition_is_the_same_in_all_steps(make_translator, unet_calls, normal, use_ddim):
    image = normal(3, 1, SIZE, SIZE)
    make_translator(use_ddim=use_ddim).sample(image, BANDS)
    assert [t.tolist() for _, t in unet_calls] == [[t] * 3 for t in (39, 26, 13, 0)]
    conditions = [x[:, 1] for x, _ in unet_calls]
    assert all(torch.equal(condition, conditions[0]) for condition in conditions)
    hidden = torch.cat([band_mask(band, SIZE, WIDTH) for band in BANDS])
    assert torch.equal(conditions[0][~hidden], image[:, 0][~hidden])
    assert not (conditions[0] == image[:, 0])[hidden].any()
    assert conditions[0][hidden].std().item() == pytest.approx(1, abs=0.25)


def test_noise_depends_on_the_band_but_not_on_the_batch(make_translator, unet_calls, normal):
    translator, images = make_translator(), normal(4, 1, SIZE, SIZE)
    a, b = BANDS[:2]
    translator.sample(images, [a, b, a, b])
    translator.sample(images[3:], [a])
    together, alone = unet_calls[0][0], unet_calls[4][0]
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
    assert not torch.equal(unet_calls[0][0], unet_calls[1][0])  # x_t changes at each step


def test_noise_is_standard_normal(make_translator):
    bands = [Band(direction, start) for direction in ("horizontal", "vertical") for start in range(SIZE)]
    inputs = []

    def model(x, t, condition):
        inputs.append((x, condition))
        return x * 0

    translator = make_translator(model=model)
    translator.sample(torch.zeros(32, 1, SIZE, SIZE), bands)
    hidden = translator.mask(bands)
    x_last, noise = (drawn[hidden] for drawn in inputs[0])
    assert not inputs[0][1][~hidden].any()
    for draws in (x_last, noise):
        assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())
        assert abs(draws.var().item() - 1) < 5 * math.sqrt(2 / draws.numel())
    assert abs(torch.corrcoef(torch.stack([x_last, noise]))[0, 1]) < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize("use_ddim", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_depend_only_on_seed_and_band(make_translator, normal, use_ddim, eta):
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


def test_ancestral_noise_is_independent_between_steps(make_translator):
    """If the network returns 0, with the large variance, the noise added by step t is x_{t-1} − c x_t."""
    inputs = []
    translator = make_translator(model=lambda x, t, **condition: inputs.append(x) or x * 0, use_ddim=False)
    translator.sample(torch.zeros(3, 1, SIZE, SIZE), BANDS)
    draws = torch.stack([x.flatten() for x in inputs])
    added = [draws[0]]
    for before, after in itertools.pairwise(draws):
        slope = (before @ after) / (before @ before)
        added.append(after - slope * before)
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / math.sqrt(draws.shape[1])
    assert all(noise.std() > 0.1 for noise in added)


@pytest.mark.parametrize("use_ddim", [True, False])
def test_sampling_does_not_depend_on_the_hidden_band(make_translator, normal, use_ddim):
    image, translator = normal(3, 1, SIZE, SIZE), make_translator(use_ddim=use_ddim)
    hidden, sample = translator.mask(BANDS), translator.sample(image, BANDS)
    assert torch.equal(translator.sample(image + 100 * hidden, BANDS), sample)
    outside = translator.sample(image + 0.5 * ~hidden, BANDS)
    assert not torch.allclose(outside, sample, atol=1e-2)
    assert sample[hidden].std() > 0.01


def test_predicted_x_0_is_not_clipped(make_translator, normal):
    """Normalised slices range from −3 to beyond 3, so clipping to [−1, 1] would destroy them."""
    image = normal(3, 1, SIZE, SIZE)
    sample = make_translator(model=lambda x, t, condition: x * 0 + 5.0).sample(image, BANDS)
    torch.testing.assert_close(sample, torch.full_like(image, 5.0))
