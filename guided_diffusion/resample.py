"""Which timesteps a training step looks at, and how its losses are weighted to stay unbiased."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .gaussian_diffusion import GaussianDiffusion


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> "ScheduleSampler":
    """`uniform`, or `loss-second-moment` (Nichol & Dhariwal 2021, section 3.3).

    Raises:
        ValueError: an unknown name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise ValueError(f"unknown schedule sampler {name!r}: choose uniform or loss-second-moment")


class ScheduleSampler(ABC):
    """A distribution over timesteps; weighting by 1 / (T·p) keeps the expected loss that of a uniform draw."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights of the timesteps, float64 [T]; they need not sum to 1."""

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw timesteps, int64 [batch_size], and the weights of their losses, float32 [batch_size] (on the CPU)."""
        p = torch.from_numpy(self.weights())
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1.0 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027  (most samplers learn nothing)
        """Tell the sampler the losses [N] that the timesteps t [N] gave, in this process's share of the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it has learnt from updates."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027  (most samplers learn nothing)
        """Go on with what `state_dict` returned."""


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: GaussianDiffusion):
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossSecondMomentResampler(ScheduleSampler):
    """Timesteps in proportion to √E[L_t²] over their last losses, once every timestep has a full history.

    Args:
        diffusion: gives the number of timesteps.
        history_per_term: losses that are remembered of each timestep.
        uniform_prob: share of the draws that stays uniform, so that no timestep is forgotten.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.uniform_prob = uniform_prob
        self._history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        num_timesteps, history_per_term = self._history.shape
        if (self._counts < history_per_term).any():
            return np.ones(num_timesteps)
        weights = np.sqrt(np.mean(self._history**2, axis=1))
        weights /= weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / num_timesteps

    def update(self, t: Tensor, losses: Tensor) -> None:
        of_all = dist_util.gather((t.tolist(), losses.tolist()))  # so that every process learns the same
        pairs = (
            pair for t_of_one, losses_of_one in of_all for pair in zip(t_of_one, losses_of_one, strict=True)
        )
        for step, loss in pairs:
            self._history[step, self._counts[step] % self._history.shape[1]] = loss
            self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": torch.from_numpy(self._history), "counts": torch.from_numpy(self._counts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._history[:] = state["history"].cpu().numpy()
        self._counts[:] = state["counts"].cpu().numpy()
