"""Denoising autoencoder baseline (Kascenas et al. 2022): a UNet that removes coarse noise from a slice."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn

from utils.random import keyed_generator

from .cyclic_unet import UNetTranslator
from .method import Method, Objective

BACKGROUND = -3.0 + 1e-3  # of preprocessed slices is −3; resizing leaves a little more


def coarse_noise(n: int, image_size: int, noise_size: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw the noise of the denoising autoencoder, [n, 1, image_size, image_size] (Kascenas et al. 2022, section 2.2).

    Gaussian noise with standard deviation `std` on a noise_size × noise_size grid, upsampled to the slice and shifted
    cyclically by a random offset, so that the grid's nodes fall on different pixels in each sample.
    """
    coarse = std * torch.randn(n, 1, noise_size, noise_size, generator=generator)
    noise = F.interpolate(coarse, (image_size, image_size), mode="bilinear")
    shifts = torch.randint(image_size, (n, 2), generator=generator).tolist()
    return torch.stack([one.roll(shift, (1, 2)) for one, shift in zip(noise, shifts, strict=True)])


def draw_denoising(
    step: int,
    *,
    seed: int,
    batch_size: int,
    image_size: int,
    noise_size: int,
    noise_std: float,
    share: slice = slice(None),
) -> tuple[Tensor]:
    """Draw the coarse noise [N, 1, H, W] of a training step; arguments as in `draw_masked_diffusion`."""
    generator = keyed_generator("training", seed, step)
    return (coarse_noise(batch_size, image_size, noise_size, noise_std, generator)[share],)


def denoising_losses(network: nn.Module, image: Tensor, target: Tensor, draws: Sequence[Tensor]) -> Tensor:
    """Return the squared error [N] of slices [N, 1, H, W] denoised from coarse noise on their foreground."""
    (noise,) = draws
    noisy = torch.where(image > BACKGROUND, image + noise, image)
    return (network(noisy) - image).square().flatten(1).mean(1)


class DenoisingAutoencoder(Method):
    """A UNet trained to remove coarse noise, applied to slices without noise."""

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        return UNetTranslator(**score_model.model)

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        baselines = config.score_model.baselines
        draw = partial(
            draw_denoising,
            seed=config.seed,
            batch_size=config.score_model.training.batch_size,
            image_size=config.data.image_size,
            noise_size=baselines.noise_size,
            noise_std=baselines.noise_std,
            share=share,
        )
        return Objective(denoising_losses, draw)

    def bounds(self, config: ConfigDict) -> dict[str, tuple[float, float]]:
        return {"score_model.baselines.noise_size": (1, config.data.image_size)}


METHOD = DenoisingAutoencoder()
