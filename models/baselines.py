"""What the cycles are compared with: the histogram cycle, and networks that reconstruct the input modality itself.

The anomaly score of all is the squared error of the reconstruction, as it is that of a cycle.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.unet import UNetModel
from utils.device import to_device
from utils.random import keyed_generator

BACKGROUND = -3.0 + 1e-3  # in slices as preprocessing writes them, and what resizing makes of it


class HistogramTranslator(nn.Module):
    """E[B | A] of single pixels, from the joint histogram of the training slices: a cycle without any network.

    A pixel is translated by its own intensity alone. What a cycle of networks scores beyond a cycle of these is what it
    has learnt of anatomy.
    """

    def __init__(self, bins: int = 256):
        super().__init__()
        self.register_buffer("range", torch.tensor([0.0, 1.0]))  # least and greatest A
        self.register_buffer("means", torch.zeros(bins))  # of B, by bin of A

    def fit(self, image: Tensor, target: Tensor) -> None:
        """Take E[B | A] from pixels of A and B, of any shape. Empty bins lie on the line between their neighbours."""
        image, target = image.flatten().double(), target.flatten().double()
        self.range.copy_(torch.stack(image.aminmax()))
        index, bins = self._bins(image), len(self.means)
        counts = torch.bincount(index, minlength=bins)
        sums = torch.bincount(index, weights=target, minlength=bins)
        filled = counts.nonzero().flatten()
        right = torch.searchsorted(filled, torch.arange(bins)).clamp(1 if len(filled) > 1 else 0, len(filled) - 1)
        means = sums[filled] / counts[filled]
        if len(filled) > 1:
            first, last = filled[right - 1], filled[right]
            share = (torch.arange(bins) - first) / (last - first)
            means = torch.lerp(means[right - 1], means[right], share.double())
        self.means.copy_(means)

    def forward(self, image: Tensor) -> Tensor:
        """The translation of `image`, any shape; intensities beyond those of training count as the last of them."""
        return self.means[self._bins(image)]

    def _bins(self, image: Tensor) -> Tensor:
        low, high = self.range.to(image.dtype)
        share = (image - low) / (high - low).clamp(min=1e-12)
        return (share * len(self.means)).long().clamp(0, len(self.means) - 1)


class Autoencoder(nn.Sequential):
    """A convolutional autoencoder whose bottleneck is too small to copy a lesion through (Baur et al. 2021).

    A level halves the resolution as often as the UNet's do, and the bottleneck keeps `latent_channels` at the lowest:
    8 of them, at 128 px, are 512 numbers for 16,384 pixels.

    Args:
        model_channels, channel_mult, norm_groups: as for `UNetModel`; levels are twice as wide, since nothing bridges.
        latent_channels: of the bottleneck.
    """

    def __init__(self, model_channels: int, channel_mult: Sequence[int], norm_groups: int, latent_channels: int):
        widths = [2 * model_channels * mult for mult in channel_mult]

        def block(conv: nn.Module, channels: int) -> list[nn.Module]:
            return [conv, nn.GroupNorm(norm_groups, channels), nn.SiLU()]

        layers = block(nn.Conv2d(1, widths[0], 3, padding=1), widths[0])
        for before, width in pairwise(widths):
            layers += block(nn.Conv2d(before, width, 3, stride=2, padding=1), width)
        layers += [nn.Conv2d(widths[-1], latent_channels, 1)]
        layers += block(nn.Conv2d(latent_channels, widths[-1], 1), widths[-1])
        for width, before in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.Upsample(scale_factor=2), *block(nn.Conv2d(width, before, 3, padding=1), before)]
        super().__init__(*layers, nn.Conv2d(widths[0], 1, 3, padding=1))


def coarse_noise(n: int, image_size: int, noise_size: int, std: float, generator: torch.Generator) -> Tensor:
    """The noise of the denoising autoencoder, [n, 1, image_size, image_size] (Kascenas et al. 2022, section 2.2).

    Gaussian noise of deviation `std` on a grid of noise_size × noise_size, enlarged to the slice, shifted cyclically
    so that no pixel always lies on a node of the grid.
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
    """The coarse noise [N, 1, H, W] of a training step; arguments as in `draw_masked_diffusion`."""
    generator = keyed_generator("training", seed, step)
    return (coarse_noise(batch_size, image_size, noise_size, noise_std, generator)[share],)


def denoising_losses(model: nn.Module, image: Tensor, draws: Sequence[Tensor]) -> Tensor:
    """Squared error [N] of slices [N, 1, H, W] that are freed from coarse noise on their foreground."""
    (noise,) = draws
    noisy = torch.where(image > BACKGROUND, image + noise, image)
    return (model(noisy) - image).square().flatten(1).mean(1)


class DenoisingUNet(UNetModel):
    """Denoises x_t of the input modality; there is no condition."""

    def __init__(self, **kwargs):
        super().__init__(in_channels=1, out_channels=1, **kwargs)


def draw_diffusion(
    step: int,
    *,
    seed: int,
    batch_size: int,
    image_size: int,
    schedule_sampler: ScheduleSampler,
    share: slice = slice(None),
) -> tuple[Tensor, ...]:
    """Timesteps, their weights and noise of a training step; arguments as in `draw_masked_diffusion`."""
    generator = keyed_generator("training", seed, step)
    t, weights = schedule_sampler.sample(batch_size, generator)
    noise = torch.randn(batch_size, 1, image_size, image_size, generator=generator)
    return t[share], weights[share], noise[share]


def diffusion_losses(
    model: nn.Module,
    image: Tensor,
    draws: Sequence[Tensor],
    *,
    diffusion: GaussianDiffusion,
    schedule_sampler: ScheduleSampler,
) -> Tensor:
    """The diffusion's loss [N] for slices [N, 1, H, W]; arguments as in `masked_diffusion_losses`."""
    t, weights, noise = draws
    losses = diffusion.training_losses(model, image, t, noise=noise)["loss"]
    schedule_sampler.update(t, losses.detach())
    return weights * losses


class PartialDiffusion(nn.Module):
    """AnoDDPM (Wyatt et al. 2022): noise a slice up to a part of the schedule only, and denoise it from there.

    What healthy anatomy has in common survives so little noise; a lesion should not. All noise is keyed by the seed,
    the same for every slice.

    Args:
        model: a trained `DenoisingUNet`.
        diffusion: the process, respaced to timesteps up to the one that slices are noised to.
        seed: of the noise.
        use_ddim: DDIM steps with eta 0; else ancestral ones, as in the paper.
    """

    def __init__(self, model: nn.Module, diffusion: GaussianDiffusion, *, seed: int, use_ddim: bool):
        super().__init__()
        self.model, self.diffusion, self.seed = model, diffusion, seed
        self.sample_loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop

    def forward(self, image: Tensor) -> Tensor:
        """The reconstruction [N, 1, H, W] of slices [N, 1, H, W]."""

        def noise(*use: int | str) -> Tensor:
            drawn = torch.randn(image.shape[1:], generator=keyed_generator(self.seed, "partial", *use))
            return to_device(drawn, image.device).expand_as(image)

        last = torch.full((len(image),), self.diffusion.num_timesteps - 1, device=image.device)
        return self.sample_loop(
            self.model,
            image.shape,
            noise=self.diffusion.q_sample(image, last, noise("x_t")),
            clip_denoised=False,
            step_noise=lambda step: noise("step", step),
        )
