"""A slice scored by MMCCD: its bands and passes, and the timed work on synthetic slices.

Torch is imported inside the functions, so that `--help` answers at once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from .work import Work, untrained_network


class Sweep(NamedTuple):
    """The scoring of a slice: the config, the bands that hide some brain, and the DDIM steps of each sample."""

    config: Any
    bands: Sequence[Any]
    steps: int

    @property
    def passes(self) -> int:
        """Network passes: the steps of each sample forward, and one pass backward."""
        return len(self.bands) * (self.steps + 1)


def whole_sweep(config: Any, preset: str) -> Sweep:
    """Return how a preset of the config scores the synthetic slice."""
    from models.masks import band_masks, sweep
    from models.sampling import SAMPLING, create_diffusion, sampling_keys

    config = config.copy_and_resolve_references()
    size, width, sampling = config.data.image_size, config.score_model.mask.width, config.score_model.sampling
    config.update_from_flattened_dict(sampling_keys(*SAMPLING[preset], width))
    bands = sweep(size, sampling.stride)
    _, brainmask = synthetic_slices(1, size)
    hides_brain = (band_masks(bands, size, width) & brainmask).flatten(1).any(1).tolist()
    steps = create_diffusion(config.score_model.diffusion, sampling.timestep_respacing).num_timesteps
    return Sweep(config, [band for band, hides in zip(bands, hides_brain, strict=True) if hides], steps)


def prepare_optimised_score(sweep: Sweep, device: Any, n_slices: int, samples: int | None = None) -> Work:
    """Return a function that scores some of `n_slices` slices, by default one, as modality_cyclic_test.py does.

    `samples` to come, if not those of `n_slices`, decide whether the networks are compiled.
    """
    from models import load_method
    from models.mmccd import mmccd
    from scoring.scorer import GPU_BATCH
    from utils.device import autocast, pick_precision, speed_up_passes

    batch_size = sweep.config.score_model.sampling.batch_size
    if device.type == "cuda":
        batch_size = max(batch_size, GPU_BATCH)
    precision = pick_precision(sweep.config.precision, device)
    samples = n_slices * len(sweep.bands) if samples is None else samples
    forward, backward = (
        speed_up_passes(untrained_network(name, sweep.config), device, precision, partial(int, samples * steps))
        for name, steps in (("diffusion", sweep.steps), ("unet", 1))
    )
    translator = load_method("diffusion").create_translator(forward, sweep.config)
    image, brainmask = synthetic_slices(n_slices, sweep.config.data.image_size)
    image = image.to(device)
    how = {"bands": sweep.bands, "batch_size": batch_size}

    def work(slices: int = 1) -> Any:
        with autocast(device, precision):
            return mmccd(image[:slices], brainmask[:slices], translator, backward, **how).error

    return work


def synthetic_slices(n: int, size: int) -> tuple[Any, Any]:
    """Return image and brain mask [n, 1, size, size]: noise in an ellipse of a brain's size, on a background of −3."""
    import torch

    across = (torch.arange(size) + 0.5) / size - 0.5  # in widths of the image, from its centre
    brain = (across[:, None] / 0.43) ** 2 + (across[None, :] / 0.35) ** 2 < 1
    brainmask = brain.expand(n, 1, size, size)
    noise = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(0))
    return torch.where(brainmask, noise, -3.0), brainmask
