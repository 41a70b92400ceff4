"""Sampling with fewer timesteps than in training (Nichol & Dhariwal 2021, section 4)."""

import re
from collections.abc import Collection
from itertools import accumulate

import numpy as np
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Collection[int]) -> set[int]:
    """Choose the timesteps to keep in a respaced process.

    Args:
        num_timesteps: number of steps in training.
        section_counts: number of steps to keep in each of equally long sections, as integers or a string ("10,15,20");
            each section keeps its first and last step and spaces the others evenly. "ddimN" keeps N steps at an integer
            stride from 0, as in Song et al. 2021. "trailingN" keeps N evenly spaced steps that include the last one,
            where sampling starts, and omit 0: the best spacing for few steps (Lin et al. 2024, "Common Diffusion Noise
            Schedules and Sample Steps are Flawed", section 3.3). An empty string keeps every step.

    Raises:
        ValueError: if `section_counts` is malformed or does not fit `num_timesteps`.
    """
    kind, counts = "sections", section_counts
    if isinstance(section_counts, str):
        kind, numbers = re.fullmatch(r"(?s)(ddim|trailing|)(.*)", section_counts).groups()
        counts = numbers.split(",") if numbers else []
        if not all(re.fullmatch("[0-9]+", count) for count in counts) or (kind and len(counts) != 1):
            raise ValueError(f"timestep_respacing {section_counts!r} is not of the form N, N,N,…, ddimN or trailingN")
    counts = [int(count) for count in counts] or [num_timesteps]
    if kind == "ddim":
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == counts[0]:
                return set(range(0, num_timesteps, stride))
        raise ValueError(f"no integer stride keeps exactly {counts[0]} of {num_timesteps} timesteps")
    size, longer = divmod(num_timesteps, len(counts))
    lengths = [size + (section < longer) for section in range(len(counts))]
    kept: set[int] = set()
    for start, length, count in zip(accumulate([0, *lengths]), lengths, counts, strict=False):
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} of {length} timesteps: choose 1 to {length}")
        if kind == "trailing":
            return {round(length - i * length / count) - 1 for i in range(count)}
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Accumulated rather than multiplied, so that halves round as in the public library.
        kept.update(start + round(position) for position in accumulate([0.0] + [stride] * (count - 1)))
    return kept


class SpacedDiffusion(GaussianDiffusion):
    """Diffusion process over a subset of another one's timesteps, with the same marginals at these.

    Args:
        use_timesteps: steps of the original process to keep.
        kwargs: arguments of the original `GaussianDiffusion`.

    Raises:
        ValueError: if `use_timesteps` is empty or has a step outside the original process.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs):
        original = GaussianDiffusion(**kwargs)
        self.timestep_map = sorted(use_timesteps)
        self.original_num_steps = original.num_timesteps
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < original.num_timesteps:
            raise ValueError(f"use_timesteps must be a non-empty subset of 0 … {original.num_timesteps - 1}")
        # Choose β to reproduce the original ᾱ at the kept steps: ᾱ_i = Π (1 − β_j)
        alphas_cumprod = original.alphas_cumprod[self.timestep_map]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(**{**kwargs, "betas": betas})

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps of the original process, which the model was trained on."""
        original = self._schedule_tensor("timestep_map", t.device)[t]
        return original * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original
