"""Building blocks of the networks and the training loop."""

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return sinusoidal embeddings (Vaswani et al. 2017; cosines first) of timesteps [N], float32 [N, dim].

    Timesteps may be fractional. An odd `dim` is padded with a zero. The longest wavelength is 2π·max_period steps.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the parameters of `module`, so that a residual block ending in it starts as the identity, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Dropout(nn.Dropout):
    """Dropout with faster random numbers on CPUs, where torch's own take a quarter of a training step.

    Each 64-bit draw decides four elements by 16 bits each, so p is rounded to a multiple of 2⁻¹⁶.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to x of any shape; as `nn.Dropout` unless on a CPU, in training, with 0 < p < 1."""
        below = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or not 0 < below < 2**16:
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        return (x / (1 - below / 2**16)).masked_fill(bits < below - 2**15, 0.0)


def film(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return norm(x)·(1 + scale) + shift (FiLM, Perez et al. 2018), for x [N, C, H, W]; scale and shift [N, C, 1, 1].

    Where neither float32 results nor a compiler ask for this formula, a group norm over N·C channels applies both with
    its own weights, and so reads and writes x once instead of three times.
    """
    if norm.weight.dtype == torch.float32 or torch.compiler.is_compiling():
        return norm(x) * (1 + scale) + shift
    n, c, *size = x.shape
    scale = 1 + scale
    weight = norm.weight.view(-1, 1, 1) * scale
    bias = norm.bias.view(-1, 1, 1) * scale + shift
    channels = x.reshape(1, n * c, *size)
    h = nn.functional.group_norm(channels, n * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps)
    return h.reshape(x.shape)


@torch.no_grad()
def update_ema(averaged: list[Tensor], current: list[Tensor], rate: float | Tensor) -> None:
    """Update all averaged parameters in place: ema ← rate·ema + (1 − rate)·value.

    A recorded step needs `rate` as a tensor on the same device, because a number would be fixed in the recording.
    """
    if isinstance(rate, Tensor):
        differences = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(differences, 1 - rate)
        torch._foreach_add_(averaged, differences)
    else:
        torch._foreach_lerp_(averaged, current, 1 - rate)
