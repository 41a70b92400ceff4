"""The histogram cycle: a pixel is translated by its own intensity, with E[B | A] of the training slices.

A cycle of networks that scores higher than this one has learnt something of anatomy.
"""

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from .method import Method


class HistogramTranslator(nn.Module):
    """E[B | A] of single pixels, from the joint histogram of the training slices."""

    def __init__(self, bins: int = 256):
        super().__init__()
        self.register_buffer("range", torch.tensor([0.0, 1.0]))  # lowest and highest A
        self.register_buffer("means", torch.zeros(bins))  # of B, by bin of A

    def fit(self, image: Tensor, target: Tensor) -> None:
        """Estimate E[B | A] from pixels of A and B, of any shape. Empty bins are interpolated linearly."""
        image, target = image.flatten().double(), target.flatten().double()
        self.range.copy_(torch.stack(image.aminmax()))
        index, bins = self._bins(image), len(self.means)
        counts = torch.bincount(index, minlength=bins)
        sums = torch.bincount(index, weights=target, minlength=bins)
        filled = counts.nonzero().flatten()
        right = torch.searchsorted(filled, torch.arange(bins)).clamp(1 if len(filled) > 1 else 0, len(filled) - 1)
        means = sums[filled] / counts[filled]
        if len(filled) > 1:
            first, last = filled[right - 1], filled[right]
            share = (torch.arange(bins) - first) / (last - first)
            means = torch.lerp(means[right - 1], means[right], share.double())
        self.means.copy_(means)

    def forward(self, image: Tensor) -> Tensor:
        """Translate `image`, of any shape. Intensities outside the training range are clipped to it."""
        return self.means[self._bins(image)]

    def _bins(self, image: Tensor) -> Tensor:
        low, high = self.range.to(image.dtype)
        share = (image - low) / (high - low).clamp(min=1e-12)
        return (share * len(self.means)).long().clamp(0, len(self.means) - 1)


class HistogramCycle(Method):
    """Two histogram translators, fitted without gradient descent."""

    fixed = ()

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        return HistogramTranslator()

    def fit(self, network: HistogramTranslator, image: Tensor, target: Tensor) -> None:
        network.fit(image, target)


METHOD = HistogramCycle()
