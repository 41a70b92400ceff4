"""Setup and fixtures for all tests: one thread per process, small diffusions, networks and images."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the scripts that tests start

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion
from utils import recording

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(scope="session", autouse=True)
def _restore_sigint() -> None:
    """Restore the SIGINT handler: a shell makes background commands and their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def make_diffusion() -> Callable[..., GaussianDiffusion]:
    """Make a diffusion with linear β, by default the paper's; `use_timesteps` respaces it."""

    def make(
        steps: int = 1000,
        mean_type: ModelMeanType = ModelMeanType.START_X,
        var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        use_timesteps: list[int] | None = None,
        rescale_timesteps: bool = False,
    ) -> GaussianDiffusion:
        settings = {
            "betas": get_named_beta_schedule("linear", steps),
            "model_mean_type": mean_type,
            "model_var_type": var_type,
            "loss_type": LossType.MSE,
            "rescale_timesteps": rescale_timesteps,
        }
        if use_timesteps is None:
            return GaussianDiffusion(**settings)
        return SpacedDiffusion(use_timesteps, **settings)

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Randomise all weights, including zero-initialised ones, so that a UNet's output depends on every one."""

    def draw(network: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(0.1 * noise + is_norm_weight)
        return network.eval()

    return draw


class StandInGraph:
    """Stand-in for a CUDA graph: runs nothing when captured, and writes into the same outputs at each replay."""

    def __init__(self, work: Callable[[], torch.Tensor | None]):
        self.work, self.outputs = work, None

    def replay(self) -> None:
        outputs = self.work()
        if self.outputs is None:
            self.outputs = outputs
        else:
            self.outputs.copy_(outputs)

    @staticmethod
    def warm_up(work: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        return work()


@pytest.fixture
def graphs(monkeypatch) -> list[StandInGraph]:
    """Make the CPU take the paths of a GPU, with stand-ins for CUDA graphs; return those that are captured."""
    captured: list[StandInGraph] = []

    class Graph(StandInGraph):
        def __init__(self, work: Callable[[], torch.Tensor | None]):
            super().__init__(work)
            captured.append(self)

    monkeypatch.setattr(recording, "Graph", Graph)
    monkeypatch.setattr(recording, "available", lambda device: True)
    return captured


@pytest.fixture
def no_capture(graphs, monkeypatch) -> None:
    """Make every capture fail."""

    def fail(work: Callable[[], torch.Tensor | None]) -> None:
        raise RuntimeError("operation not permitted\nmore of it")

    fail.warm_up = StandInGraph.warm_up
    monkeypatch.setattr(recording, "Graph", fail)


@pytest.fixture
def small_brains() -> torch.Tensor:
    """Masks of a large brain, one that few bands cross, and one at the border: bool [3, 1, 16, 16]."""
    mask = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    mask[0, :, 2:14, 3:13] = True
    mask[1, :, 6:9, 10:12] = True
    mask[2, :, 12:, :5] = True
    return mask


@pytest.fixture
def write_slices() -> Callable[..., None]:
    """Write slices as preprocessing does: `write_slices(data_dir, split, {kind: {(subject, slice): array}})`."""

    def write(data_dir: Path, split: str, arrays: dict[str, dict[tuple[str, int], np.ndarray]]) -> None:
        for kind, slices in arrays.items():
            folder = data_dir / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for (subject, number), array in slices.items():
                np.save(folder / f"{subject}_{kind}_{number}.npy", array)

    return write
