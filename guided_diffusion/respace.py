"""Sampling with fewer steps than were trained (Nichol & Dhariwal 2021, section 4)."""

import re
from collections.abc import Collection
from itertools import accumulate

import numpy as np
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Collection[int]) -> set[int]:
    """Choose the timesteps that a shorter process keeps.

    Args:
        num_timesteps: steps of the process that was trained.
        section_counts: how many to keep of each of as many equal sections, as numbers or as a string with commas
            ("10,15,20"); in each section the first and the last step are kept and the others spaced evenly.
            "ddimN" keeps N steps a whole stride apart, beginning at 0, as in Song et al. 2021. "trailingN" keeps N
            steps evenly apart that end at the last one, where sampling begins, and leave out 0, which adds little:
            of all spacings the best for few steps (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample
            Steps are Flawed", section 3.3). An empty string keeps every step.

    A ValueError if what is asked for cannot be had.
    """
    kind, counts = "sections", section_counts
    if isinstance(section_counts, str):
        kind, numbers = re.fullmatch(r"(ddim|trailing|)(.*)", section_counts).groups()
        counts = numbers.split(",") if numbers else []
        if not all(re.fullmatch("[0-9]+", count) for count in counts) or (kind and len(counts) != 1):
            raise ValueError(
                f"timestep_respacing {section_counts!r} is not a number, numbers with commas, ddimN, or trailingN"
            )
    counts = [int(count) for count in counts] or [num_timesteps]
    if kind == "ddim":
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == counts[0]:
                return set(range(0, num_timesteps, stride))
        raise ValueError(f"no whole stride keeps exactly {counts[0]} of {num_timesteps} timesteps")
    size, longer = divmod(num_timesteps, len(counts))
    lengths = [size + (section < longer) for section in range(len(counts))]
    kept: set[int] = set()
    for start, length, count in zip(accumulate([0, *lengths]), lengths, counts, strict=False):
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} of {length} timesteps: choose 1 to {length}")
        if kind == "trailing":
            return {round(length - i * length / count) - 1 for i in range(count)}
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Added up, not multiplied: where a sum lies halfway, it then rounds as in the public library.
        kept.update(start + round(position) for position in accumulate([0.0] + [stride] * (count - 1)))
    return kept


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process that keeps only some steps of a longer one, with the same marginals at those.

    Args:
        use_timesteps: the steps of the original process that are kept.
        kwargs: the original process, as for `GaussianDiffusion`.

    A ValueError for a step that the original process does not have, or none.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs):
        original = GaussianDiffusion(**kwargs)
        self.timestep_map = sorted(use_timesteps)
        self.original_num_steps = original.num_timesteps
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < original.num_timesteps:
            raise ValueError(f"use_timesteps must name some of the steps 0 … {original.num_timesteps - 1}")
        # β that reproduce the original ᾱ at the kept steps: ᾱ_i = Π (1 − β_j)
        alphas_cumprod = original.alphas_cumprod[self.timestep_map]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(**{**kwargs, "betas": betas})

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The model is told the original timestep of each kept one."""
        original = self._schedule_on("timestep_map", t.device)[t]
        return original * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original
