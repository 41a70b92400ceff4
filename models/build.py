"""From a config to the networks, their losses and the diffusion: where a new translation model is entered."""

import time
from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.resample import ScheduleSampler, create_named_schedule_sampler
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from utils.device import DrawnAhead

from .baselines import (
    Autoencoder,
    DenoisingUNet,
    HistogramTranslator,
    PartialDiffusion,
    denoising_losses,
    diffusion_losses,
    draw_denoising,
    draw_diffusion,
)
from .masked_diffusion import (
    MaskedConditionalUNet,
    MaskedDiffusionTranslator,
    draw_masked_diffusion,
    masked_diffusion_losses,
)
from .masks import Band
from .translator import UNetTranslator, translation_losses

# Of the UNet's settings, `score_model.model`. What else there is, create_network knows.
NETWORKS = {"unet": UNetTranslator, "diffusion": MaskedConditionalUNet, "dae": UNetTranslator, "ddpm": DenoisingUNet}

Losses = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def create_network(model_name: str, score_model: ConfigDict) -> nn.Module:
    """The network of `--model_name`, with fresh weights.

    A ValueError for widths that the norm's groups or the heads do not divide.
    """
    if model_name == "histogram":
        return HistogramTranslator()
    model = score_model.model
    if model_name == "autoencoder":
        latent_channels = score_model.baselines.latent_channels
        return Autoencoder(model.model_channels, model.channel_mult, model.norm_groups, latent_channels)
    return NETWORKS[model_name](**model)


def create_losses(
    model_name: str, config: ConfigDict, device: torch.device, share: slice = slice(None)
) -> tuple[Losses, ScheduleSampler | None]:
    """What training minimises: `losses(model, image, target, step)` is [N] for slices [N, 1, H, W] on the device.

    They are given the `share` of every batch. Beside them comes the diffusion's schedule sampler, if there is one. A
    ValueError as from `create_diffusion`, or for an unknown schedule sampler.
    """
    if model_name in ("unet", "autoencoder", "histogram"):
        return lambda model, image, target, step: translation_losses(model, image, target), None
    score_model = config.score_model
    batch_size, image_size = score_model.training.batch_size, config.data.image_size
    drawn = {"seed": config.seed, "batch_size": batch_size, "image_size": image_size, "share": share}
    if model_name == "dae":
        noise = {key: score_model.baselines[key] for key in ("noise_size", "noise_std")}
        draw = DrawnAhead(partial(draw_denoising, **noise, **drawn), device)
        return lambda model, image, target, step: denoising_losses(model, image, draw(step)), None
    diffusion = create_diffusion(score_model.diffusion)
    schedule_sampler = create_named_schedule_sampler(score_model.training.schedule_sampler, diffusion)
    drawn |= {"schedule_sampler": schedule_sampler}
    process, ahead = {"diffusion": diffusion, "schedule_sampler": schedule_sampler}, int(not schedule_sampler.learns)
    if model_name == "ddpm":
        draw = DrawnAhead(partial(draw_diffusion, **drawn), device, ahead)
        losses = partial(diffusion_losses, **process)
        return lambda model, image, target, step: losses(model, image, draw(step)), schedule_sampler
    bands = {"band_width": score_model.mask.width, "band_stride": score_model.mask.stride}
    draw = DrawnAhead(partial(draw_masked_diffusion, **bands, **drawn), device, ahead)
    losses = partial(masked_diffusion_losses, **process)
    return lambda model, image, target, step: losses(model, image, target, draw(step)), schedule_sampler


def seconds_a_step(model_name: str, config: ConfigDict, device: torch.device) -> float:
    """About how long a training step takes, from losses and gradients of a single slice; errors as from the above."""
    if model_name == "histogram":
        return 0.0
    single = config.copy_and_resolve_references()
    single.score_model.training.batch_size = 1
    network = create_network(model_name, config.score_model).to(device)
    losses, _ = create_losses(model_name, single, device)
    image = torch.zeros(1, 1, config.data.image_size, config.data.image_size, device=device)
    for step in range(2):  # the first one is slow
        started = time.perf_counter()
        losses(network, image, image, step).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return config.score_model.training.batch_size * (time.perf_counter() - started)


def bytes_a_sample(model_name: str, config: ConfigDict) -> int:
    """About what a sample of a training batch takes: all that a step keeps of it for its gradients, in float32.

    It is measured on slices so small that they take no time, and grows with the number of pixels.
    """
    if model_name == "histogram":
        return 0
    small = config.copy_and_resolve_references()
    small.score_model.training.batch_size = 1
    small.data.image_size = size = 2 ** len(config.score_model.model.channel_mult)
    network = create_network(model_name, config.score_model)
    image, weights, kept = torch.zeros(1, 1, size, size), {one.data_ptr() for one in network.parameters()}, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.nbytes
        return tensor

    losses, _ = create_losses(model_name, small, image.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(network, image, image, 0)
    return kept * config.data.image_size**2 // size**2


def create_masked_translator(model: MaskedConditionalUNet, config: ConfigDict) -> MaskedDiffusionTranslator:
    """A trained masked diffusion, ready to sample as the config says; a ValueError as from `create_diffusion`."""
    sampling = config.score_model.sampling
    return MaskedDiffusionTranslator(
        model,
        create_diffusion(config.score_model.diffusion, sampling.timestep_respacing),
        image_size=config.data.image_size,
        band_width=config.score_model.mask.width,
        seed=config.seed,
        use_ddim=sampling.use_ddim,
        eta=sampling.eta,
    )


def create_reconstructor(model_name: str, network: nn.Module, config: ConfigDict) -> nn.Module:
    """What maps slices to slices in a single pass: the network, or the whole chain of steps of `ddpm`.

    A ValueError as from `create_diffusion`.
    """
    if model_name != "ddpm":
        return network
    score_model, sampling = config.score_model, config.score_model.sampling
    last = score_model.baselines.noise_timestep
    diffusion = create_diffusion(score_model.diffusion, sampling.timestep_respacing, last + 1)
    return PartialDiffusion(network, diffusion, seed=config.seed, use_ddim=sampling.use_ddim)


@torch.no_grad()
def translate_example(model_name: str, network: nn.Module, image: Tensor, config: ConfigDict) -> tuple[Tensor, Tensor]:
    """What a network in training is shown of `image`, and its translation: [1, 1, H, W] all.

    For a diffusion model a band in the middle is hidden, and shown as grey.
    """
    if model_name != "diffusion":
        return image, create_reconstructor(model_name, network, config)(image)
    translator = create_masked_translator(network, config)
    middle = [Band("horizontal", (config.data.image_size - config.score_model.mask.width) // 2)]
    return image.masked_fill(translator.mask(middle).to(image.device), 0.0), translator.sample(image, middle)


def create_diffusion(
    diffusion_config: ConfigDict, timestep_respacing: str = "", first_steps: int | None = None
) -> SpacedDiffusion:
    """The diffusion process, with all its steps or respaced to fewer, of all or only of its first ones.

    A ValueError for an unknown schedule, prediction or variance, too few steps for the schedule, or a respacing that
    cannot be had.
    """
    steps = diffusion_config.steps
    spaced = first_steps or steps
    use_timesteps = space_timesteps(spaced, timestep_respacing)
    if len(use_timesteps) == 1:  # one step leads from the noisiest to x_0: it is the last, not the first
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
