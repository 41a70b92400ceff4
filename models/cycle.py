"""The modality cycle A → B → A and its error, the anomaly score (Liang et al. 2023, section 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.device import in_batches


class Cycle(NamedTuple):
    """The result of a cycle for slices A [N, 1, H, W]; all fields have this shape.

    Attributes:
        error: squared cyclic error, the mean over all draws of a pixel. Only MMCCD has more than one.
        translation: B, the mean over the draws.
        reconstruction: A again, the mean over the draws.
        variance: of the reconstruction's draws around their mean.
    """

    error: Tensor
    translation: Tensor
    reconstruction: Tensor
    variance: Tensor


def anomaly_score(image: Tensor, cycle: Cycle, score: str, error_floor: float = 0.0) -> Tensor:
    """Return the anomaly score of each pixel of A [N, 1, H, W], from the mean m and the variance v of its draws.

    "errors" is the paper's score, the mean of (A − draw)², which equals (A − m)² + v. The variance v is high wherever
    the model is unsure, at sulci and ventricles, lesion or not; "reconstructions" is (A − m)² alone. "standardised" is
    (A − m)² / (v + c), so that an error counts more where the draws agree. c, the `error_floor`, covers the noise of A
    and the errors that all draws share; the mean of this score over healthy tissue is 1.
    """
    if score == "errors":
        return cycle.error
    deviation = (image - cycle.reconstruction).square()
    return deviation if score == "reconstructions" else deviation / (cycle.variance + error_floor)


def error_floor(image: Tensor, cycle: Cycle, healthy: Tensor) -> float:
    """Return the constant c of the "standardised" score: the mean of (A − m)² − v over `healthy`, bool [N, 1, H, W].

    The variance of the draws and c then add up to the squared error of healthy tissue. To prevent a division by 0, c is
    at least a hundredth of that error; it is 1 if no pixel is healthy.
    """
    if not healthy.any():
        return 1.0
    total = (image - cycle.reconstruction)[healthy].square().mean()
    return float(torch.maximum(total - cycle.variance[healthy].mean(), total / 100).clamp(min=1e-6))


@torch.inference_mode()
def modality_cycle(
    image: Tensor,
    forward: nn.Module,
    backward: nn.Module,
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda samples: None,
    reference: Tensor | None = None,
) -> Cycle:
    """Compute (A − backward(forward(A)))² for every pixel of A [N, 1, H, W]: Cyclic UNet and all methods of one draw.

    Args:
        image: A, on the translators' device.
        forward, backward: map slices to slices. For a reconstruction method `backward` is the identity.
        batch_size: slices at a time.
        progress: called with the size of each finished batch.
        reference: the slices that the end of the cycle is compared with, if not A.
    """
    translation, reconstruction = torch.empty_like(image), torch.empty_like(image)

    def pass_over(batch: Sequence[int]) -> None:
        rows = slice(batch[0], batch[-1] + 1)  # a list of indices would have to be copied to the device
        translation[rows] = forward(image[rows])
        reconstruction[rows] = backward(translation[rows])

    in_batches(pass_over, list(range(len(image))), batch_size, progress)
    reference = image if reference is None else reference
    error = (reference - reconstruction).square()
    return Cycle(error, translation, reconstruction, torch.zeros_like(error))
