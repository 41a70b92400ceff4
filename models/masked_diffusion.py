"""Masked conditional diffusion: the forward translator of MMCCD (Liang et al. 2023, section 2.2).

The diffusion makes the target modality from noise. It is conditioned on the input image, of which one band is
replaced by noise, so that under the band it has to imagine what healthy tissue looks like there.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.unet import UNetModel
from utils.random import keyed_generator

from .masks import Band, band_masks, random_bands


def masked_condition(image: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """The condition c: `image` outside the mask, standard Gaussian `noise` under it. All [N, 1, H, W]."""
    return torch.where(mask, noise, image)


class MaskedConditionalUNet(UNetModel):
    """Denoises x_t of the target modality, with the masked input modality as a second channel; predicts x_0."""

    def __init__(self, **kwargs):
        super().__init__(in_channels=2, out_channels=1, **kwargs)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Args: x_t: [N, 1, H, W]; t: [N]; condition: a `masked_condition`, [N, 1, H, W]. Returns: [N, 1, H, W]."""
        return super().forward(torch.cat([x_t, condition], dim=1), t)


def masked_diffusion_losses(
    model: nn.Module,
    image: Tensor,
    target: Tensor,
    *,
    diffusion: GaussianDiffusion,
    schedule_sampler: ScheduleSampler,
    band_width: int,
    band_stride: int,
    seed: int,
    step: int,
    batch_size: int | None = None,
    share: slice = slice(None),
) -> Tensor:
    """The diffusion's loss [N] for a batch of slices or a share of it, with one random band for each of them.

    Bands, timesteps and noise are drawn by (seed, step) and a sample's place in the batch, whoever computes its loss.

    Args:
        model: a `MaskedConditionalUNet`.
        image: input modality, [N, 1, H, W].
        target: target modality of the same slices, x_0 of the diffusion.
        diffusion: the process with all its steps.
        schedule_sampler: draws the timesteps and weights their losses.
        band_width: px.
        band_stride: px between possible starts.
        seed: of the run.
        step: number of the training step.
        batch_size: of the whole batch, if `image` and `target` are a share of it.
        share: which.
    """
    n, image_size, device = batch_size or len(image), image.shape[-1], image.device
    generator = keyed_generator("training", seed, step)
    bands = random_bands(n, image_size, band_stride, generator)
    mask = band_masks(bands[share], image_size, band_width).to(device)
    t, weights = (value[share].to(device) for value in schedule_sampler.sample(n, generator))
    condition_noise, noise = torch.randn(2, n, *image.shape[1:], generator=generator)[:, share].to(device)
    condition = masked_condition(image, mask, condition_noise)
    losses = diffusion.training_losses(model, target, t, {"condition": condition}, noise)["loss"]
    schedule_sampler.update(t, losses.detach())
    return weights * losses


class MaskedDiffusionTranslator:
    """Samples the translation of an image whose band is hidden.

    All noise is keyed by the seed and the band, the same for every slice: x_T, the noise under the band (held over
    all steps, so that DDIM with eta 0 is deterministic) and what ancestral steps add. The predicted x_0 is not clipped.

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
        """The pixels that each band hides, bool [N, 1, H, W]."""
        return band_masks(bands, self.image_size, self.band_width)

    def sample(self, image: Tensor, bands: Sequence[Band]) -> Tensor:
        """Translate image i with band i hidden: [N, 1, H, W] to [N, 1, H, W], on the image's device."""
        device = image.device
        hidden, noise = self.mask(bands).to(device), self._noise_once(bands, "condition").to(device)
        return self.sample_loop(
            self.model,
            image.shape,
            noise=self._noise_once(bands, "x_T").to(device),
            clip_denoised=False,
            model_kwargs={"condition": masked_condition(image, hidden, noise)},
            step_noise=lambda step: torch.stack([self._noise(band, "step", step) for band in bands]).to(device),
        )

    def _noise(self, band: Band, *use: int | str) -> Tensor:
        shape = (1, self.image_size, self.image_size)
        return torch.randn(shape, generator=keyed_generator(self.seed, *band, *use))

    def _noise_once(self, bands: Sequence[Band], use: str) -> Tensor:
        """Drawn for the first slice that meets a band and kept for the others: two images a band in all."""
        for band in bands:
            if (band, use) not in self._drawn:
                self._drawn[band, use] = self._noise(band, use)
        return torch.stack([self._drawn[band, use] for band in bands])
