"""The description of a method: everything that training, testing and prediction ask of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from guided_diffusion.resample import ScheduleSampler

from .cycle import Cycle, modality_cycle


class Objective(NamedTuple):
    """The training objective of a method.

    Attributes:
        losses: (network, image, target, draws) → losses [N] of slices [N, 1, H, W]. It runs on the device: all shapes
            are fixed, and nothing waits for a value.
        draw: training step → the random tensors of this process's share of the batch, on the CPU. They depend on the
            seed and the step alone.
        schedule_sampler: of a diffusion's timesteps.
    """

    losses: Callable[[nn.Module, Tensor, Tensor, Sequence[Tensor]], Tensor]
    draw: Callable[[int], tuple[Tensor, ...]] = lambda step: ()
    schedule_sampler: ScheduleSampler | None = None


class Method:
    """Base class of the methods, with the defaults of a network that maps slices to slices in one pass.

    Attributes:
        fixed: beginnings of the config keys that training fixes, beside `ALWAYS_FIXED`.
        unused: beginnings of config keys that training does not read, so that they may change when it resumes.
        samples_are: name of the samples that `count_samples` counts, for the terminal.
        fit: (network, image, target) fits the network to all training slices at once; None: gradient descent.
    """

    ALWAYS_FIXED = ("data.input", "data.trans", "data.image_size")
    fixed: tuple[str, ...] = ("score_model.model.",)
    unused: tuple[str, ...] = ("score_model.mask.",)
    samples_are = "slices"
    fit: Callable[[nn.Module, Tensor, Tensor], None] | None = None

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        """Return the network with fresh weights.

        Raises:
            ValueError: if the settings describe no network, as with widths that the groups or heads do not divide.
        """
        raise NotImplementedError

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        """Return the training objective for the `share` of each batch that this process computes.

        Raises:
            ValueError: as from `create_diffusion`, or for an unknown schedule sampler.
        """
        raise NotImplementedError

    def create_translator(self, network: nn.Module, config: ConfigDict) -> Any:
        """Return a trained network in the form that translates or reconstructs slices at test time.

        Raises:
            ValueError: as from `create_diffusion`.
        """
        return network

    @torch.no_grad()
    def translate_example(self, network: nn.Module, image: Tensor, config: ConfigDict) -> tuple[Tensor, Tensor]:
        """Return the input of a network in training as a picture, and its translation: all [1, 1, H, W]."""
        return image, self.create_translator(network, config)(image)

    def cycle(
        self, image: Tensor, brainmask: Tensor, forward: Any, backward: Any, config: ConfigDict, **how: Any
    ) -> Cycle:
        """Run slices [N, 1, H, W] through the translators; `how` holds the keyword arguments of `modality_cycle`."""
        return modality_cycle(image, forward, backward, **how)

    def count_samples(self, brainmask: Tensor, translator: Any, config: ConfigDict) -> int:
        """Return how many samples slices with these brain masks [N, 1, H, W] take."""
        return len(brainmask)

    def count_steps(self, translator: Any) -> int:
        """Return the passes of the forward network that a sample takes."""
        return 1

    def score_kind(self, config: ConfigDict) -> str:
        """Return the kind of anomaly score, one of `anomaly_score`."""
        return "errors"

    def bounds(self, config: ConfigDict) -> dict[str, tuple[float, float]]:
        """Return the least and the greatest value of config keys that only this method restricts."""
        return {}

    def sampling_defaults(self, config: ConfigDict, preset: str | None) -> dict[str, Any]:
        """Return config keys with the values they have unless the user sets them; `preset` is that of `--sampling`."""
        return {}

    def sampling_settings(self, config: ConfigDict) -> dict[str, Any]:
        """Return all settings, in JSON's types, that the scores of given weights depend on."""
        return {"smooth": config.score_model.sampling.smooth}

    def sampling_name(self, config: ConfigDict) -> str | None:
        """Return the name of the sampling in metrics.json; None where there is nothing to choose."""
        return None

    def results_suffix(self, config: ConfigDict) -> str:
        """Return the last part of a results folder's name, which tells one sampling or filter from another."""
        return config.score_model.sampling.smooth.replace("none", "")
