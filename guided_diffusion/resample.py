"""Timestep samplers for training, with loss weights that keep the objective unbiased."""

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .gaussian_diffusion import GaussianDiffusion


class ScheduleSampler:
    """Uniform timestep sampler, and base class for samplers with other `weights`; losses are weighted by 1 / (T·p)."""

    adaptive = False  # whether `update` changes the weights

    def __init__(self, diffusion: GaussianDiffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> np.ndarray:
        """Return the positive sampling weights of the timesteps, float64 [T]; they need not sum to 1."""
        return np.ones(self.num_timesteps)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return random timesteps, int64 [batch_size], and their loss weights, float32 [batch_size], on the CPU."""
        p = torch.from_numpy(self.weights())
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1.0 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the losses [N] at timesteps t [N], from this process's share of the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state changed by `update`."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state returned by `state_dict`."""


class LossSecondMomentResampler(ScheduleSampler):
    """Importance sampler, p_t ∝ √E[L_t²] (Nichol & Dhariwal 2021, section 3.3); uniform until the history is full.

    Args:
        diffusion: process to sample timesteps of.
        history_per_term: losses to keep per timestep.
        uniform_prob: fraction of draws that stays uniform, so that every timestep remains possible.
    """

    adaptive = True

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(diffusion)
        self.uniform_prob = uniform_prob
        self._history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        if (self._counts < self._history.shape[1]).any():
            return super().weights()
        weights = np.sqrt(np.mean(self._history**2, axis=1))
        weights /= weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update(self, t: Tensor, losses: Tensor) -> None:
        # Gather from all processes, so that every one of them updates to the same weights.
        for timesteps, values in dist_util.gather((t.tolist(), losses.tolist())):
            for step, loss in zip(timesteps, values, strict=True):
                self._history[step, self._counts[step] % self._history.shape[1]] = loss
                self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": torch.from_numpy(self._history), "counts": torch.from_numpy(self._counts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._history[:] = state["history"].cpu().numpy()
        self._counts[:] = state["counts"].cpu().numpy()


SCHEDULE_SAMPLERS = {"uniform": ScheduleSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """Create one of SCHEDULE_SAMPLERS.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(f"unknown schedule sampler {name!r}: choose {' or '.join(SCHEDULE_SAMPLERS)}")
    return SCHEDULE_SAMPLERS[name](diffusion)
