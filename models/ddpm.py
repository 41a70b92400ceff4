"""AnoDDPM baseline (Wyatt et al. 2022): noises a slice to a part of the schedule and denoises it from there."""

from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.unet import UNetModel
from utils.device import to_device
from utils.random import keyed_generator

from .method import Method, Objective
from .sampling import create_diffusion, diffusion_losses, diffusion_objective, sampling_settings

PAPER_TIMESTEP = 249  # `noise_timestep` of the paper's config


class DenoisingUNet(UNetModel):
    """Denoises x_t of the input modality, without a condition."""

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
    """Draw timesteps, their weights and noise for a training step; arguments as in `draw_masked_diffusion`."""
    generator = keyed_generator("training", seed, step)
    t, weights = schedule_sampler.sample(batch_size, generator)
    noise = torch.randn(batch_size, 1, image_size, image_size, generator=generator)
    return t[share], weights[share], noise[share]


class PartialDiffusion(nn.Module):
    """Reconstructs a slice by noising it up to a part of the schedule and denoising it from there.

    That much noise preserves the anatomy but should remove a lesion. All noise is keyed by the seed and is the same for
    every slice.

    Args:
        model: a trained `DenoisingUNet`.
        diffusion: the process, with timesteps up to the one that slices are noised to.
        seed: of the noise.
        use_ddim: DDIM steps with eta 0; else ancestral ones, as in the paper.
    """

    def __init__(self, model: nn.Module, diffusion: GaussianDiffusion, *, seed: int, use_ddim: bool):
        super().__init__()
        self.model, self.diffusion, self.seed = model, diffusion, seed
        self.sample_loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop

    def forward(self, image: Tensor) -> Tensor:
        """Return the reconstruction [N, 1, H, W] of slices [N, 1, H, W]."""

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


class AnoDDPM(Method):
    """Samples ancestrally and with all steps, as in its paper, unless the user says otherwise."""

    fixed = ("score_model.model.", "score_model.diffusion.")

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        return DenoisingUNet(**score_model.model)

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        return diffusion_objective(config, share, draw_diffusion, diffusion_losses)

    def create_translator(self, network: nn.Module, config: ConfigDict) -> PartialDiffusion:
        score_model, sampling = config.score_model, config.score_model.sampling
        last = score_model.baselines.noise_timestep
        diffusion = create_diffusion(score_model.diffusion, sampling.timestep_respacing, last + 1)
        return PartialDiffusion(network, diffusion, seed=config.seed, use_ddim=sampling.use_ddim)

    def count_steps(self, translator: PartialDiffusion) -> int:
        return translator.diffusion.num_timesteps

    def bounds(self, config: ConfigDict) -> dict[str, tuple[float, float]]:
        return {"score_model.baselines.noise_timestep": (0, max(config.score_model.diffusion.steps - 1, 0))}

    def sampling_defaults(self, config: ConfigDict, preset: str | None) -> dict[str, Any]:
        return {"score_model.sampling.use_ddim": False, "score_model.sampling.timestep_respacing": ""}

    def sampling_settings(self, config: ConfigDict) -> dict[str, Any]:
        return sampling_settings(config) | {"noise_timestep": config.score_model.baselines.noise_timestep}

    def results_suffix(self, config: ConfigDict) -> str:
        """Name the differences from the paper, `ddim100`, `noise400`, …, and the filter."""
        sampling, last = config.score_model.sampling, config.score_model.baselines.noise_timestep
        kind = "ddim" if sampling.use_ddim else "ancestral"
        respaced = sampling.use_ddim or sampling.timestep_respacing
        differences = [
            f"noise{last + 1}" if last != PAPER_TIMESTEP else "",
            f"{kind}{sampling.timestep_respacing.replace(',', '-')}" if respaced else "",
            f"seed{config.seed}" if config.seed else "",
            super().results_suffix(config),
        ]
        return "_".join(filter(None, differences))


METHOD = AnoDDPM()
