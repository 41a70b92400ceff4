"""The modality cycle A → B → A and its error, the anomaly score (Liang et al. 2023, section 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.device import in_batches, to_device

from .masked_diffusion import MaskedDiffusionTranslator
from .masks import Band


class Cycle(NamedTuple):
    """What a cycle makes of slices A [N, 1, H, W]; all of the same shape, and means over the draws of a pixel.

    error: squared cyclic error; translation: B; reconstruction: A again; variance: of the reconstruction's draws around
    their mean. Cyclic UNet has a single draw.
    """

    error: Tensor
    translation: Tensor
    reconstruction: Tensor
    variance: Tensor


def anomaly_score(image: Tensor, cycle: Cycle, score: str, usual_error: float = 0.0) -> Tensor:
    """How anomalous each pixel of A [N, 1, H, W] is, from the mean m and the variance v of its reconstructions.

    "errors" is the paper's score, the mean of (A − draw)², which is (A − m)² + v. But v says where the model is unsure,
    at sulci and ventricles, and nothing about A: "reconstructions" is (A − m)² alone. "standardised" is
    (A − m)² / (v + c): the same error counts for more where the draws agree. c is what the draws do not show, the noise
    of A and the errors that all draws share: `usual_error`. In healthy tissue this score is 1 in the mean.
    """
    if score == "errors":
        return cycle.error
    deviation = (image - cycle.reconstruction).square()
    return deviation if score == "reconstructions" else deviation / (cycle.variance + usual_error)


def usual_error(image: Tensor, cycle: Cycle, healthy: Tensor) -> float:
    """The constant c of the "standardised" score: the mean of (A − m)² − v over the healthy pixels, bool [N, 1, H, W].

    The variance of the draws and c then add up to the squared error of healthy tissue. At least a hundredth of that, so
    that no score is divided by 0; 1 where no pixel is healthy.
    """
    if not healthy.any():
        return 1.0
    total = (image - cycle.reconstruction)[healthy].square().mean()
    return float(torch.maximum(total - cycle.variance[healthy].mean(), total / 100).clamp(min=1e-6))


@torch.inference_mode()
def cyclic_unet(
    image: Tensor,
    forward: nn.Module,
    backward: nn.Module,
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda samples: None,
    reference: Tensor | None = None,
) -> Cycle:
    """Cyclic UNet: (A − backward(forward(A)))² of every pixel, for image A [N, 1, H, W].

    `batch_size` slices at a time; `progress` is told after each batch how many it had. With `reference`, the end is
    compared with that instead of A.
    """
    translation, reconstruction = torch.empty_like(image), torch.empty_like(image)

    def pass_over(batch: Sequence[int]) -> None:
        rows = slice(batch[0], batch[-1] + 1)  # a list of them would have to be copied to the device
        translation[rows] = forward(image[rows])
        reconstruction[rows] = backward(translation[rows])

    in_batches(pass_over, list(range(len(image))), batch_size, progress, image.device)
    reference = image if reference is None else reference
    error = (reference - reconstruction).square()
    return Cycle(error, translation, reconstruction, torch.zeros_like(error))


def slices_and_bands(
    brainmask: Tensor, forward: MaskedDiffusionTranslator, bands: Sequence[Band]
) -> list[tuple[int, Band]]:
    """What MMCCD samples: every slice of `brainmask` with every band that hides some of its brain.

    `brainmask` is [N, 1, H, W], on the CPU: how many bands that are is not known before it has been looked at.
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
    """MMCCD: of every pixel the mean of (A − backward(forward(A with a band hidden)))² over the bands that hid it.

    Bands that hide no brain of a slice are not sampled. Translation and reconstruction are put together in the
    same way, from what each band had hidden; where no band passed, they are the image, which is background there.
    Every reconstruction is one draw of what the hidden tissue may look like.

    Args:
        image: A, [N, 1, H, W], on the translators' device.
        brainmask: bool [N, 1, H, W], on the CPU.
        forward: samples B from A with a band hidden.
        backward: B to A.
        bands: the sweep.
        batch_size: network samples at a time; it changes the memory needed, not the scores.
        progress: told after each batch how many samples it had.
        reference: what the end of the cycle is compared with, if not A.
    """
    reference = image if reference is None else reference
    # In double precision, since the variance is the small difference of two sums where an error is large.
    sums = torch.zeros(4, *image.shape, dtype=torch.float64, device=image.device)

    def pass_over(batch: Sequence[tuple[int, Band]]) -> None:
        slices, bands_of = zip(*batch, strict=True)
        index = to_device(torch.tensor(slices), image.device)
        hidden = to_device(forward.mask(bands_of), image.device)
        translation = forward.sample(image[index], bands_of)
        reconstruction = backward(translation)
        error = (reference[index].double() - reconstruction).square()
        found = torch.stack([error, translation, reconstruction, torch.ones_like(error)]) * hidden
        sums.index_add_(1, index, found)  # all at once: a batch that is tried again must not count twice

    in_batches(pass_over, slices_and_bands(brainmask, forward, bands), batch_size, progress, image.device)
    *sums, counts = sums
    error, translation, reconstruction = (total / counts.clamp(min=1) for total in sums)
    translation, reconstruction = (torch.where(counts > 0, mean, reference) for mean in (translation, reconstruction))
    variance = (error - (reference - reconstruction).square()).clamp(min=0)
    return Cycle(*(field.float() for field in (error, translation, reconstruction, variance)))
