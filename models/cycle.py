"""The modality cycle A → B → A and its error, the anomaly score (Liang et al. 2023, section 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.device import in_batches


class Cycle(NamedTuple):
    """What a cycle makes of slices A [N, 1, H, W]; all of the same shape, and means over the draws of a pixel.

    error: squared cyclic error; translation: B; reconstruction: A again; variance: of the reconstruction's draws around
    their mean. Cyclic UNet has a single draw.
    """

    error: Tensor
    translation: Tensor
    reconstruction: Tensor
    variance: Tensor


def anomaly_score(image: Tensor, cycle: Cycle, score: str, error_floor: float = 0.0) -> Tensor:
    """How anomalous each pixel of A [N, 1, H, W] is, from the mean m and the variance v of its reconstructions.

    "errors" is the paper's score, the mean of (A − draw)², which is (A − m)² + v. But v says where the model is unsure,
    at sulci and ventricles, and nothing about A: "reconstructions" is (A − m)² alone. "standardised" is
    (A − m)² / (v + c): the same error counts for more where the draws agree. c is what the draws do not show, the noise
    of A and the errors that all draws share: `error_floor`. In healthy tissue this score is 1 in the mean.
    """
    if score == "errors":
        return cycle.error
    deviation = (image - cycle.reconstruction).square()
    return deviation if score == "reconstructions" else deviation / (cycle.variance + error_floor)


def error_floor(image: Tensor, cycle: Cycle, healthy: Tensor) -> float:
    """The constant c of the "standardised" score: the mean of (A − m)² − v over the healthy pixels, bool [N, 1, H, W].

    The variance of the draws and c then add up to the squared error of healthy tissue. At least a hundredth of that, so
    that no score is divided by 0; 1 where no pixel is healthy.
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
