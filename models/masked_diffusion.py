"""Masked conditional diffusion: the forward translator of MMCCD (Liang et al. 2023, section 2.2).

The diffusion generates the target modality from noise, conditioned on the input image with one band replaced by noise.
Under the band it generates tissue as it has seen it there in healthy training slices.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.unet import UNetModel
from utils.device import Prefetcher, to_device
from utils.random import keyed_generator

from .masks import Band, band_masks, random_bands
from .sampling import diffusion_losses


def masked_condition(image: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Return the condition: `image` outside the mask, standard Gaussian `noise` under it. All [N, 1, H, W]."""
    return torch.where(mask, noise, image)


class MaskedConditionalUNet(UNetModel):
    """Denoises x_t of the target modality, with the masked input modality as a second channel; predicts x_0."""

    def __init__(self, **kwargs):
        super().__init__(in_channels=2, out_channels=1, **kwargs)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Args: x_t: [N, 1, H, W]; t: [N]; condition: a `masked_condition`, [N, 1, H, W]. Returns: [N, 1, H, W]."""
        return super().forward(torch.cat([x_t, condition], dim=1), t)


def draw_masked_diffusion(
    step: int,
    *,
    seed: int,
    batch_size: int,
    image_size: int,
    band_width: int,
    band_stride: int,
    schedule_sampler: ScheduleSampler,
    share: slice = slice(None),
) -> tuple[Tensor, ...]:
    """Draw the random band, timestep and noise of each sample of a training step.

    They depend on the seed, the step and the sample's place in the batch, not on the number of processes.

    Args:
        step: of training.
        seed: of the run.
        batch_size: of the whole batch.
        image_size: H = W, px.
        band_width: px.
        band_stride: px between possible starts.
        schedule_sampler: draws the timesteps and weights their losses.
        share: the part of the batch to return.

    Returns:
        mask bool [N, 1, H, W], timesteps [N] and their weights [N], noise for the condition and for x_t [N, 1, H, W].
    """
    generator = keyed_generator("training", seed, step)
    bands = random_bands(batch_size, image_size, band_stride, generator)
    t, weights = schedule_sampler.sample(batch_size, generator)
    condition_noise, noise = torch.randn(2, batch_size, 1, image_size, image_size, generator=generator)
    mask = band_masks(bands[share], image_size, band_width)
    return mask, t[share], weights[share], condition_noise[share], noise[share]


def masked_diffusion_losses(
    model: nn.Module,
    image: Tensor,
    target: Tensor,
    draws: Sequence[Tensor],
    *,
    diffusion: GaussianDiffusion,
    schedule_sampler: ScheduleSampler,
) -> Tensor:
    """Return the diffusion's loss [N] for a batch of slices.

    Args:
        model: a `MaskedConditionalUNet`.
        image: input modality, [N, 1, H, W].
        target: target modality of the same slices, x_0 of the diffusion.
        draws: as from `draw_masked_diffusion`, on the model's device.
        diffusion: the process with all its steps.
        schedule_sampler: updated with the losses.
    """
    mask, t, weights, condition_noise, noise = draws
    condition = masked_condition(image, mask, condition_noise)
    process = {"diffusion": diffusion, "schedule_sampler": schedule_sampler}
    return diffusion_losses(model, image, target, (t, weights, noise), **process, condition=condition)


class MaskedDiffusionTranslator:
    """Samples the translation of an image with a band hidden. The predicted x_0 is not clipped.

    All noise is keyed by the seed and the band and is the same for every slice: x_T, the noise under the band (fixed
    over the steps, so that DDIM with eta 0 is deterministic) and the noise of ancestral steps.

    Args:
        model: a trained `MaskedConditionalUNet`, on its device.
        diffusion: the process, respaced to the steps of sampling.
        image_size: H = W, px.
        band_width: px.
        seed: of the noise.
        use_ddim: DDIM steps; else ancestral ones.
        eta: DDIM's, 0 is deterministic.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        image_size: int,
        band_width: int,
        seed: int,
        use_ddim: bool,
        eta: float,
    ):
        self.model = model
        self.diffusion = diffusion
        self.image_size = image_size
        self.band_width = band_width
        self.seed = seed
        self.sample_loop = diffusion.p_sample_loop
        if use_ddim:
            self.sample_loop = partial(diffusion.ddim_sample_loop, eta=eta)
        self._drawn: dict[tuple, Tensor] = {}

    def mask(self, bands: Sequence[Band]) -> Tensor:
        """Return the pixels that each band hides, bool [N, 1, H, W]."""
        return band_masks(bands, self.image_size, self.band_width)

    def sample(self, image: Tensor, bands: Sequence[Band]) -> Tensor:
        """Translate image i with band i hidden: [N, 1, H, W] to [N, 1, H, W], on the image's device."""
        device = image.device
        once = (self.mask(bands), self._noise_once(bands, "condition"), self._noise_once(bands, "x_T"))
        hidden, noise, x_T = (to_device(tensor, device) for tensor in once)

        def draw(step: int) -> tuple[Tensor]:
            return (torch.stack([self._noise(band, "step", step) for band in bands]),)

        step_noise = Prefetcher(draw, device, ahead=-1)
        return self.sample_loop(
            self.model,
            image.shape,
            noise=x_T,
            clip_denoised=False,
            model_kwargs={"condition": masked_condition(image, hidden, noise)},
            step_noise=lambda step: step_noise(step)[0],
        )

    def _noise(self, band: Band, *use: int | str) -> Tensor:
        shape = (1, self.image_size, self.image_size)
        return torch.randn(shape, generator=keyed_generator(self.seed, *band, *use))

    def _noise_once(self, bands: Sequence[Band], use: str) -> Tensor:
        """Return noise that is drawn once for each band and reused for all slices: two images a band."""
        for band in bands:
            if (band, use) not in self._drawn:
                self._drawn[band, use] = self._noise(band, use)
        return torch.stack([self._drawn[band, use] for band in bands])
