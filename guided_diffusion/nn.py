"""Small pieces that the networks and the training loop are made of."""

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps (Vaswani et al. 2017; cosines come first).

    Args:
        timesteps: [N], any real dtype.
        dim: width of the embedding; an odd one is padded with a zero.
        max_period: the longest wavelength is 2π·max_period steps.

    Returns:
        float32 [N, dim].
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to 0, so that the branch it ends starts out as the identity; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, rate: float) -> None:
    """Move every trained parameter of `ema_model` towards that of `model`: ema ← rate·ema + (1 − rate)·value."""
    for averaged, current in zip(ema_model.parameters(), model.parameters(), strict=True):
        if current.requires_grad:
            averaged.lerp_(current, 1.0 - rate)
