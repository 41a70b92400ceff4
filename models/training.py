"""The losses of a method for the training loop, and the time and memory that a step takes."""

import time
from collections.abc import Callable, Sequence

import torch
from ml_collections import ConfigDict
from torch import Tensor

from guided_diffusion.resample import ScheduleSampler
from utils.device import Prefetcher

from .method import Method

Losses = Callable[..., Tensor]
Draws = Callable[[int], Sequence[Tensor]]


def create_losses(
    method: Method, config: ConfigDict, device: torch.device, share: slice = slice(None)
) -> tuple[Losses, Draws, ScheduleSampler | None]:
    """Return a method's training objective on the device, for the `share` of each batch that this process computes.

    Returns:
        `losses(network, image, target, *draws)`, [N] for slices [N, 1, H, W]; `draws(step)`, the random tensors of a
        step; and the diffusion's schedule sampler.

    Raises:
        ValueError: as from `Method.create_objective`.
    """
    losses, draw, schedule_sampler = method.create_objective(config, share)
    adaptive = schedule_sampler is not None and schedule_sampler.adaptive  # then draws depend on the step before
    draws = Prefetcher(draw, device, ahead=int(not adaptive))
    return lambda network, image, target, *draws: losses(network, image, target, draws), draws, schedule_sampler


def seconds_a_step(method: Method, config: ConfigDict, device: torch.device) -> float:
    """Estimate the duration of a training step from the losses and gradients of a single slice."""
    single = config.copy_and_resolve_references()
    single.score_model.training.batch_size = 1
    network = method.create_network(config.score_model).to(device)
    losses, draws, _ = create_losses(method, single, device)
    image = torch.zeros(1, 1, config.data.image_size, config.data.image_size, device=device)
    for step in range(2):  # the first step is slow
        started = time.perf_counter()
        losses(network, image, image, *draws(step)).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return config.score_model.training.batch_size * (time.perf_counter() - started)


def weight_bytes(method: Method, config: ConfigDict) -> int:
    """Return the bytes of a network's weights, without allocating them."""
    with torch.device("meta"):
        return sum(one.nbytes for one in method.create_network(config.score_model).parameters())


def bytes_a_sample(method: Method, config: ConfigDict) -> int:
    """Estimate the float32 bytes that a training step stores for the gradients of one sample; 0 without gradients.

    Measured on a tiny slice and scaled by the number of pixels.
    """
    if method.fit:
        return 0
    small = config.copy_and_resolve_references()
    small.score_model.training.batch_size = 1
    small.data.image_size = size = 2 ** len(config.score_model.model.channel_mult)
    network = method.create_network(config.score_model)
    image, weights, kept = torch.zeros(1, 1, size, size), {one.data_ptr() for one in network.parameters()}, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.nbytes
        return tensor

    losses, draws, _ = create_losses(method, small, image.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(network, image, image, *draws(0))
    return kept * config.data.image_size**2 // size**2
