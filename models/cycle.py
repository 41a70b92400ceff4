"""The modality cycle A → B → A and its error, the anomaly score (Liang et al. 2023, section 2)."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .masked_diffusion import MaskedDiffusionTranslator
from .masks import Band


class Cycle(NamedTuple):
    """What a cycle makes of slices [N, 1, H, W]; all of the same shape.

    score: squared cyclic error, the larger the more anomalous; translation: B; reconstruction: A again.
    """

    score: Tensor
    translation: Tensor
    reconstruction: Tensor


@torch.inference_mode()
def cyclic_unet(image: Tensor, forward: nn.Module, backward: nn.Module) -> Cycle:
    """Cyclic UNet: (A − backward(forward(A)))² of every pixel, for image A [N, 1, H, W]."""
    translation = forward(image)
    reconstruction = backward(translation)
    return Cycle((image - reconstruction).square(), translation, reconstruction)


@torch.inference_mode()
def mmccd(
    image: Tensor,
    brainmask: Tensor,
    forward: MaskedDiffusionTranslator,
    backward: nn.Module,
    *,
    bands: Sequence[Band],
    batch_size: int,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Cycle:
    """MMCCD: of every pixel the mean of (A − backward(forward(A with a band hidden)))² over the bands that hid it.

    Bands that hide no brain of a slice are not sampled. Translation and reconstruction are put together in the
    same way, from what each band had hidden; where no band passed, they are the image, which is background there.

    Args:
        image: A, [N, 1, H, W], on the translators' device.
        brainmask: bool [N, 1, H, W].
        forward: samples B from A with a band hidden.
        backward: B to A.
        bands: the sweep.
        batch_size: network samples at a time; it changes the memory needed, not the scores.
        progress: wraps the sequence of batches, for a progress bar.
    """
    masks = forward.mask(bands).to(brainmask.device)
    jobs = [
        (i, bands[k])
        for i, brain in enumerate(brainmask)
        for k in (masks & brain).flatten(1).any(1).nonzero().flatten().tolist()
    ]
    sums = torch.zeros(3, *image.shape, device=image.device)
    counts = torch.zeros_like(image)
    for batch in progress([jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]):
        slices, hidden_by = zip(*batch, strict=True)
        index = torch.tensor(slices, device=image.device)
        hidden = forward.mask(hidden_by).to(image.device)
        translation = forward.sample(image[index], hidden_by)
        reconstruction = backward(translation)
        error = (image[index] - reconstruction).square()
        sums.index_add_(1, index, torch.stack([error, translation, reconstruction]) * hidden)
        counts.index_add_(0, index, hidden.float())
    score, translation, reconstruction = sums / counts.clamp(min=1)
    seen = counts > 0
    return Cycle(score, torch.where(seen, translation, image), torch.where(seen, reconstruction, image))
