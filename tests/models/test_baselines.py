"""The baselines, compared with closed forms and brute force."""

import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion.resample import create_named_schedule_sampler
from models.autoencoder import Autoencoder
from models.cyclic_histogram import HistogramTranslator
from models.dae import coarse_noise, denoising_losses, draw_denoising
from models.ddpm import DenoisingUNet, PartialDiffusion, diffusion_losses, draw_diffusion

SIZE = 16


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------
# The histogram cycle


def brute_force(a: np.ndarray, b: np.ndarray, bins: int) -> np.ndarray:
    """Compute E[B | A] of every bin in a loop; empty bins are interpolated between the others."""
    low, high = a.min(), a.max()
    index = np.minimum(((a - low) / (high - low) * bins).astype(int), bins - 1)
    filled = [k for k in range(bins) if (index == k).any()]
    return np.interp(np.arange(bins), filled, [b[index == k].mean() for k in filled])


@pytest.mark.parametrize("bins", [4, 64, 1000])
def test_histogram_is_the_mean_of_b_in_every_bin_of_a(bins):
    rng = np.random.default_rng(0)
    a = rng.normal(size=500).astype(np.float32)
    b = np.sin(3 * a) + 0.1 * rng.normal(size=500).astype(np.float32)
    network = HistogramTranslator(bins)
    network.fit(torch.from_numpy(a).reshape(5, 1, 10, 10), torch.from_numpy(b).reshape(5, 1, 10, 10))
    np.testing.assert_allclose(network.means, brute_force(a, b, bins), rtol=1e-4, atol=1e-5)
    inputs = torch.tensor([[a.min() - 5, a.min()], [a.max(), a.max() + 5]])
    first, last = network.means[0].item(), network.means[-1].item()
    assert network(inputs).flatten().tolist() == pytest.approx([first, first, last, last])
    (found,) = network(torch.tensor([0.25]))
    middle = int((0.25 - a.min()) / (a.max() - a.min()) * bins)
    assert found == network.means[middle]


def test_fitted_histogram_is_in_the_state_dict(images):
    network, other = HistogramTranslator(), HistogramTranslator()
    network.fit(images, 2 * images)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images), network(images))
    assert (other(images) - 2 * images).abs().max() < 0.1


def test_histogram_of_a_single_intensity_is_the_mean():
    network = HistogramTranslator(8)
    network.fit(torch.full((4,), 2.0), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert network(torch.tensor([2.0, -7.0, 9.0])).tolist() == [3.0, 3.0, 3.0]


# ----------------------------------------------------------------------------------------------------------
# The autoencoder


def test_bottleneck_has_a_32nd_of_the_pixels():
    network = Autoencoder(8, (1, 1, 2, 2, 2), norm_groups=4, latent_channels=8)
    sizes = []
    for layer in network:
        layer.register_forward_hook(lambda module, args, output: sizes.append(output[0].numel()))
    image = torch.zeros(2, 1, 64, 64)
    assert network(image).shape == image.shape
    assert min(sizes) == 64 * 64 // 32  # from which the later layers are computed


# ----------------------------------------------------------------------------------------------------------
# The denoising autoencoder


def test_coarse_noise_has_the_statistics_of_interpolated_noise():
    """The deviation is `std` at the nodes of the grid and less between them; the shift averages it over all pixels."""
    size, grid, std = 32, 8, 1.5
    noise = coarse_noise(4000, size, grid, std, torch.Generator().manual_seed(0))[:, 0].double()
    nodes = np.clip((np.arange(size) + 0.5) * grid / size - 0.5, 0, grid - 1)
    weights = np.stack([np.interp(nodes, np.arange(grid), np.eye(grid)[k]) for k in range(grid)], axis=1)
    axis = (weights**2).sum(1).mean()  # variance of interpolated noise, averaged over a line of pixels
    variance = noise.var(dim=0)
    assert variance.mean().item() == pytest.approx((std * axis) ** 2 / 1, rel=0.03)
    assert variance.std() / variance.mean() < 0.06
    assert noise.mean().abs() < 0.02

    def correlation(apart: int) -> float:
        return float((noise * noise.roll(apart, 2)).mean() / variance.mean())

    assert correlation(1) > 0.85
    assert abs(correlation(size // 2)) < 0.05


def test_denoising_adds_no_noise_to_the_background_and_returns_the_squared_error(images):
    images = images.clamp(min=-2.9)
    images[:, :, :4] = -3.0
    given = []

    def model(noisy):
        given.append(noisy)
        return noisy

    (noise,) = draws = draw_denoising(7, seed=0, batch_size=3, image_size=SIZE, noise_size=4, noise_std=1.0)
    losses = denoising_losses(model, images, images, draws)
    assert torch.equal(given[0][:, :, 4:], (images + noise)[:, :, 4:])
    assert torch.equal(given[0][:, :, :4], images[:, :, :4])
    assert (given[0][:, :, 4:] != images[:, :, 4:]).all()
    assert losses.tolist() == pytest.approx([((a - b) ** 2).mean().item() for a, b in zip(*given, images, strict=True)])


@pytest.mark.parametrize("kind", ["dae", "ddpm"])
def test_noise_depends_on_the_position_in_the_batch(images, kind, make_diffusion):
    diffusion = make_diffusion(50)
    sampler = create_named_schedule_sampler("uniform", diffusion)

    def losses(images, **share):
        drawn = {"seed": 0, "batch_size": 3, "image_size": SIZE, **share}
        if kind == "dae":
            draws = draw_denoising(3, noise_size=4, noise_std=1.0, **drawn)
            return denoising_losses(lambda x: 0.5 * x, images, images, draws)
        draws = draw_diffusion(3, schedule_sampler=sampler, **drawn)
        process = {"diffusion": diffusion, "schedule_sampler": sampler}
        return diffusion_losses(lambda x, t: 0.5 * x, images, images, draws, **process)

    whole = losses(images)
    assert torch.equal(losses(images[1:], share=slice(1, 3)), whole[1:])
    assert len(set(whole.tolist())) == 3


# ----------------------------------------------------------------------------------------------------------
# AnoDDPM


def alphas_cumprod(steps: int) -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.1 / steps, 20 / steps, steps))  # linear β; for 1000 steps as in Ho et al. 2020


class PerfectDenoiser(nn.Module):
    """A perfect denoiser: it returns x_0 and records its inputs."""

    def __init__(self, x_start: torch.Tensor):
        super().__init__()
        self.x_start, self.calls = x_start, []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls.append((x.clone(), t.tolist()))
        return self.x_start[: len(x)]


@pytest.mark.parametrize("use_ddim", [True, False])
def test_slice_is_noised_to_its_timestep_and_denoised_from_there(images, make_diffusion, use_ddim):
    steps, last = 1000, 249
    diffusion = make_diffusion(steps, use_timesteps=list(range(last + 1)))
    model = PerfectDenoiser(images)
    found = PartialDiffusion(model, diffusion, seed=0, use_ddim=use_ddim)(images)
    assert [t for _, t in model.calls] == [[t] * 3 for t in range(last, -1, -1)]
    first = model.calls[0][0]
    alpha_bar = alphas_cumprod(steps)[last]
    noise = (first - alpha_bar**0.5 * images) / (1 - alpha_bar) ** 0.5
    assert (noise - noise[:1]).abs().max() < 1e-4  # the same for every slice
    assert noise[0].mean().item() == pytest.approx(0, abs=0.2)
    assert noise[0].std().item() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-3)  # a perfect denoiser recovers x_0


def test_reconstruction_does_not_depend_on_other_slices(images, make_diffusion, randomise, model_config):
    network = randomise(DenoisingUNet(**model_config))
    partial = PartialDiffusion(network, make_diffusion(40, use_timesteps=[0, 5, 9]), seed=0, use_ddim=False)
    with torch.no_grad():
        together, alone = partial(images), partial(images[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(PartialDiffusion(network, partial.diffusion, seed=1, use_ddim=False)(images), together)


def test_loss_is_the_squared_error_of_the_predicted_slice(images, make_diffusion):
    diffusion = make_diffusion(50)
    sampler = create_named_schedule_sampler("uniform", diffusion)
    draws = draw_diffusion(0, seed=0, batch_size=3, image_size=SIZE, schedule_sampler=sampler)
    process = {"diffusion": diffusion, "schedule_sampler": sampler}
    losses = diffusion_losses(lambda x, t: torch.zeros_like(x), images, images, draws, **process)
    assert losses.tolist() == pytest.approx((images**2).flatten(1).mean(1).tolist(), rel=1e-5)
