"""From a config to a diffusion and its objective, and the settings, presets and names of its sampling."""

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any

from ml_collections import ConfigDict
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.resample import ScheduleSampler, create_named_schedule_sampler
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from utils.experiment import flatten

from .method import Objective

# Presets of MMCCD's sampling: DDIM steps; bands of the sweep in the width of one band, which is how many of either
# direction hide a pixel; score; filter. docs/speed.md has the cost and the scores of each.
SAMPLING = {"paper": ("100", 8, "errors", "none"), "fast": ("trailing2", 2, "standardised", "median5")}


def create_diffusion(
    diffusion_config: ConfigDict, timestep_respacing: str = "", first_steps: int | None = None
) -> SpacedDiffusion:
    """Return the diffusion process with all timesteps or, if respaced, fewer of them.

    Args:
        diffusion_config: `score_model.diffusion` of the config.
        timestep_respacing: as in `space_timesteps`; empty: all timesteps.
        first_steps: respace only this many timesteps from the first; None: all.

    Raises:
        ValueError: for an unknown schedule, prediction or variance, too few steps for the schedule, or a respacing
            that is impossible.
    """
    steps = diffusion_config.steps
    spaced = first_steps or steps
    use_timesteps = space_timesteps(spaced, timestep_respacing)
    if len(use_timesteps) == 1:  # a single step has to start from the noisiest x_t, the last
        use_timesteps = {spaced - 1}
    betas = get_named_beta_schedule(diffusion_config.noise_schedule, steps)
    if betas.max() > 1:
        raise ValueError(f"steps={steps} is too few for a {diffusion_config.noise_schedule} noise schedule")
    return SpacedDiffusion(
        use_timesteps=use_timesteps,
        betas=betas,
        model_mean_type=_member(ModelMeanType, diffusion_config.model_mean_type),
        model_var_type=_member(ModelVarType, diffusion_config.model_var_type),
        loss_type=LossType.MSE,
        rescale_timesteps=diffusion_config.rescale_timesteps,
    )


def _member(kind: type[Enum], name: str) -> Enum:
    if name not in kind.__members__:
        raise ValueError(f"unknown {kind.__name__} {name!r}: choose one of {', '.join(kind.__members__)}")
    return kind[name]


def diffusion_losses(
    network: nn.Module,
    image: Tensor,
    target: Tensor,
    draws: Sequence[Tensor],
    *,
    diffusion: GaussianDiffusion,
    schedule_sampler: ScheduleSampler,
    **condition: Tensor,
) -> Tensor:
    """Return the diffusion's weighted loss [N] for x_start `target`, [N, 1, H, W].

    Args:
        network: denoises x_t, given t and the `condition`.
        image: not used; the training objective of every method takes it.
        target: x_start of the diffusion.
        draws: timesteps [N], their weights [N] and noise [N, 1, H, W].
        diffusion: the process with all its steps.
        schedule_sampler: updated with the losses.
    """
    t, weights, noise = draws
    losses = diffusion.training_losses(network, target, t, condition, noise)["loss"]
    schedule_sampler.update(t, losses.detach())
    return weights * losses


def diffusion_objective(config: ConfigDict, share: slice, draw: Callable, losses: Callable) -> Objective:
    """Return the training objective of a diffusion from its draws and losses.

    Raises:
        ValueError: as from `create_diffusion`, or for an unknown schedule sampler.
    """
    training, diffusion = config.score_model.training, create_diffusion(config.score_model.diffusion)
    schedule_sampler = create_named_schedule_sampler(training.schedule_sampler, diffusion)
    drawn = {"seed": config.seed, "batch_size": training.batch_size, "image_size": config.data.image_size}
    draw = partial(draw, **drawn, schedule_sampler=schedule_sampler, share=share)
    return Objective(partial(losses, diffusion=diffusion, schedule_sampler=schedule_sampler), draw, schedule_sampler)


def sampling_keys(steps: str, bands_a_width: int, score: str, smooth: str, band_width: int) -> dict[str, Any]:
    """Return the config keys of a sampling, such as one of `SAMPLING`, for bands of this width in px."""
    return {
        "score_model.sampling.timestep_respacing": steps,
        "score_model.sampling.stride": max(band_width // bands_a_width, 1),
        "score_model.sampling.score": score,
        "score_model.sampling.smooth": smooth,
    }


def sampling_settings(config: ConfigDict) -> dict[str, Any]:
    """Return the seed and all settings of sampling that change the samples."""
    settings = {"seed": config.seed, **config.score_model.sampling.to_dict()}
    del settings["batch_size"]
    return settings


def sampling_name(config: ConfigDict) -> str:
    """Return the name of MMCCD's sampling for its results folder: `fast`, `ddim100`, `ddim10_stride8`, …

    It names all differences from the paper's settings, so that two samplings never share a folder.
    """
    sampling, width = config.score_model.sampling, config.score_model.mask.width
    paper, fast = (sampling_keys(*SAMPLING[name], width) for name in ("paper", "fast"))
    differences = [f"eta{sampling.eta:g}"] if sampling.use_ddim and sampling.eta else []
    if config.seed:
        differences.append(f"seed{config.seed}")
    if sampling.use_ddim and fast.items() <= dict(flatten(config)).items():
        return "_".join(["fast", *differences])
    respacing = sampling.timestep_respacing
    steps = len(space_timesteps(config.score_model.diffusion.steps, respacing))
    name = f"{'ddim' if sampling.use_ddim else 'ancestral'}{steps}"
    if respacing not in ("", str(steps)):  # ddim50, trailing2, or 10,15,25 in three sections
        differences.insert(0, respacing.removesuffix(str(steps)).replace(",", "-").replace("ddim", "strided"))
    for key, label in (("stride", f"stride{sampling.stride}"), ("score", sampling.score), ("smooth", sampling.smooth)):
        if sampling[key] != paper[f"score_model.sampling.{key}"]:
            differences.append(label)
    return "_".join([name, *differences])
