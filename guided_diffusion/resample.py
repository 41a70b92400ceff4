"""Which timesteps a training step looks at, and how its losses are weighted to stay unbiased."""

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .gaussian_diffusion import GaussianDiffusion


class ScheduleSampler:
    """Draws timesteps uniformly, and is the base of what draws them otherwise by its own `weights`.

    Weighting the losses by 1 / (T·p) keeps their expectation that of a uniform draw.
    """

    learns = False  # from the losses of one step what to draw in the next

    def __init__(self, diffusion: GaussianDiffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> np.ndarray:
        """Positive weights of the timesteps, float64 [T]; they need not sum to 1."""
        return np.ones(self.num_timesteps)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw timesteps, int64 [batch_size], and the weights of their losses, float32 [batch_size] (on the CPU)."""
        p = torch.from_numpy(self.weights())
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1.0 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Tell the sampler the losses [N] that the timesteps t [N] gave, in this process's share of the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it has learnt from updates."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with what `state_dict` returned."""


class LossSecondMomentResampler(ScheduleSampler):
    """Timesteps in proportion to √E[L_t²] over their last losses, once each has a full history.

    Nichol & Dhariwal 2021, section 3.3.

    Args:
        diffusion: gives the number of timesteps.
        history_per_term: losses that are remembered of each timestep.
        uniform_prob: share of the draws that stays uniform, so that no timestep is forgotten.
    """

    learns = True

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
        # From all processes, so that each of them learns the same.
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
    """One of SCHEDULE_SAMPLERS; a ValueError for an unknown name."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(f"unknown schedule sampler {name!r}: choose {' or '.join(SCHEDULE_SAMPLERS)}")
    return SCHEDULE_SAMPLERS[name](diffusion)
