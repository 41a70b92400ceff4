"""Sampling with fewer steps than were trained (Nichol & Dhariwal 2021, section 4)."""

from collections.abc import Collection
from itertools import accumulate

import numpy as np
import torch
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

    Raises:
        ValueError: what is asked for cannot be had.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _evenly_strided(
                num_timesteps, _number(section_counts.removeprefix("ddim"), section_counts)
            )
        if section_counts.startswith("trailing"):
            return _trailing(num_timesteps, _number(section_counts.removeprefix("trailing"), section_counts))
        counts = [_number(part, section_counts) for part in section_counts.split(",") if section_counts]
    else:
        counts = list(section_counts)
    counts = counts or [num_timesteps]
    size, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} of {length} timesteps: choose 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Added up, not multiplied: where a sum lies halfway, it then rounds as in the public library.
        kept.update(start + round(position) for position in accumulate([0.0] + [stride] * (count - 1)))
        start += length
    return kept


def _evenly_strided(num_timesteps: int, count: int) -> set[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ValueError(f"no whole stride keeps exactly {count} of {num_timesteps} timesteps")


def _trailing(num_timesteps: int, count: int) -> set[int]:
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"cannot keep {count} of {num_timesteps} timesteps: choose 1 to {num_timesteps}")
    return {round(num_timesteps - i * num_timesteps / count) - 1 for i in range(count)}


def _number(text: str, whole: str) -> int:
    if not text.isdigit():
        raise ValueError(
            f"timestep respacing {whole!r} is not a number, numbers with commas, ddimN, or trailingN"
        )
    return int(text)


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process that keeps only some steps of a longer one, with the same marginals at those.

    Args:
        use_timesteps: the steps of the original process that are kept.
        kwargs: the original process, as for `GaussianDiffusion`.

    Raises:
        ValueError: a step that the original process does not have, or none.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs):
        original = GaussianDiffusion(**kwargs)
        self.timestep_map = sorted(use_timesteps)
        self.original_num_steps = original.num_timesteps
        if (
            not self.timestep_map
            or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < original.num_timesteps
        ):
            raise ValueError(f"use_timesteps must name some of the steps 0 … {original.num_timesteps - 1}")
        # β that reproduce the original ᾱ at the kept steps: ᾱ_i = Π (1 − β_j)
        alphas_cumprod = original.alphas_cumprod[self.timestep_map]
        betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(**{**kwargs, "betas": betas})

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The model is told the original timestep of each kept one."""
        original = torch.tensor(self.timestep_map, device=t.device)[t]
        return original * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original
