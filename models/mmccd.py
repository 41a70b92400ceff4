"""MMCCD (Liang et al. 2023, section 2.2): modality cycles with masked conditional diffusion.

A band of A is hidden, the masked diffusion samples B from the rest, and a UNet maps B back to A. The bands sweep the
slice; the score of a pixel is its mean squared error over the bands that hid it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from utils.device import in_batches, to_device

from .cycle import Cycle
from .masked_diffusion import (
    MaskedConditionalUNet,
    MaskedDiffusionTranslator,
    draw_masked_diffusion,
    masked_diffusion_losses,
)
from .masks import Band, sweep
from .method import Method, Objective
from .sampling import (
    SAMPLING,
    create_diffusion,
    diffusion_objective,
    sampling_keys,
    sampling_name,
    sampling_settings,
)


def slices_and_bands(
    brainmask: Tensor, forward: MaskedDiffusionTranslator, bands: Sequence[Band]
) -> list[tuple[int, Band]]:
    """Return MMCCD's samples: the index of each slice with each band that hides some of its brain.

    `brainmask` is [N, 1, H, W], on the CPU, because the number of samples depends on it.
    """
    masks = forward.mask(bands)
    return [
        (i, bands[k])
        for i, brain in enumerate(brainmask)
        for k in (masks & brain).flatten(1).any(1).nonzero().flatten().tolist()
    ]


@torch.inference_mode()
def mmccd(
    image: Tensor,
    brainmask: Tensor,
    forward: MaskedDiffusionTranslator,
    backward: nn.Module,
    *,
    bands: Sequence[Band],
    batch_size: int,
    progress: Callable[[int], object] = lambda samples: None,
    reference: Tensor | None = None,
) -> Cycle:
    """Average (A − backward(forward(A with a band hidden)))² at each pixel over the bands that hid it.

    Each reconstruction is one draw of the tissue under its band. Translation and reconstruction are averaged in the
    same way. Bands that hide no brain of a slice are not sampled; pixels that no band hid equal `reference`.

    Args:
        image: A, [N, 1, H, W], on the translators' device.
        brainmask: bool [N, 1, H, W], on the CPU.
        forward: samples B from A with a band hidden.
        backward: B to A.
        bands: the sweep.
        batch_size: network samples at a time; it changes the memory needed, not the scores.
        progress: called with the number of samples of each finished batch.
        reference: the slices that the end of the cycle is compared with, if not A.
    """
    reference = image if reference is None else reference
    # In double precision, because the variance is the small difference of two large sums.
    sums = torch.zeros(4, *image.shape, dtype=torch.float64, device=image.device)

    def pass_over(batch: Sequence[tuple[int, Band]]) -> None:
        slices, bands_of = zip(*batch, strict=True)
        index = to_device(torch.tensor(slices), image.device)
        hidden = to_device(forward.mask(bands_of), image.device)
        translation = forward.sample(image[index], bands_of)
        reconstruction = backward(translation)
        error = (reference[index].double() - reconstruction).square()
        found = torch.stack([error, translation, reconstruction, torch.ones_like(error)]) * hidden
        sums.index_add_(1, index, found)  # in one call, so that a batch that is retried counts once

    in_batches(pass_over, slices_and_bands(brainmask, forward, bands), batch_size, progress)
    *sums, counts = sums
    error, translation, reconstruction = (total / counts.clamp(min=1) for total in sums)
    translation, reconstruction = (torch.where(counts > 0, mean, reference) for mean in (translation, reconstruction))
    variance = (error - (reference - reconstruction).square()).clamp(min=0)
    return Cycle(*(field.float() for field in (error, translation, reconstruction, variance)))


class MMCCD(Method):
    """A masked conditional diffusion forward, a UNet backward."""

    fixed = ("score_model.model.", "score_model.diffusion.", "score_model.mask.width")
    unused = ()
    samples_are = "slices with a band hidden"
    sampling_settings = staticmethod(sampling_settings)
    sampling_name = results_suffix = staticmethod(sampling_name)

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        return MaskedConditionalUNet(**score_model.model)

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        mask = config.score_model.mask
        draw = partial(draw_masked_diffusion, band_width=mask.width, band_stride=mask.stride)
        return diffusion_objective(config, share, draw, masked_diffusion_losses)

    def create_translator(self, network: nn.Module, config: ConfigDict) -> MaskedDiffusionTranslator:
        sampling = config.score_model.sampling
        return MaskedDiffusionTranslator(
            network,
            create_diffusion(config.score_model.diffusion, sampling.timestep_respacing),
            image_size=config.data.image_size,
            band_width=config.score_model.mask.width,
            seed=config.seed,
            use_ddim=sampling.use_ddim,
            eta=sampling.eta,
        )

    @torch.no_grad()
    def translate_example(self, network: nn.Module, image: Tensor, config: ConfigDict) -> tuple[Tensor, Tensor]:
        """Hide a band in the middle of the slice, which the picture shows in grey."""
        translator = self.create_translator(network, config)
        middle = [Band("horizontal", (config.data.image_size - config.score_model.mask.width) // 2)]
        return image.masked_fill(translator.mask(middle).to(image.device), 0.0), translator.sample(image, middle)

    def bands(self, config: ConfigDict) -> list[Band]:
        """Return the bands of the test-time sweep."""
        return sweep(config.data.image_size, config.score_model.sampling.stride)

    def cycle(
        self, image: Tensor, brainmask: Tensor, forward: Any, backward: Any, config: ConfigDict, **how: Any
    ) -> Cycle:
        return mmccd(image, brainmask, forward, backward, bands=self.bands(config), **how)

    def count_samples(self, brainmask: Tensor, translator: MaskedDiffusionTranslator, config: ConfigDict) -> int:
        return len(slices_and_bands(brainmask, translator, self.bands(config)))

    def count_steps(self, translator: MaskedDiffusionTranslator) -> int:
        return translator.diffusion.num_timesteps

    def score_kind(self, config: ConfigDict) -> str:
        return config.score_model.sampling.score

    def sampling_defaults(self, config: ConfigDict, preset: str | None) -> dict[str, Any]:
        return sampling_keys(*SAMPLING[preset], config.score_model.mask.width) if preset else {}


METHOD = MMCCD()
