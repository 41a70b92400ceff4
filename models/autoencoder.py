"""Autoencoder baseline (Baur et al. 2021): reconstructs a slice through a bottleneck."""

from collections.abc import Sequence
from itertools import pairwise

from ml_collections import ConfigDict
from torch import nn

from .cyclic_unet import translation_losses
from .method import Method, Objective


class Autoencoder(nn.Sequential):
    """A convolutional autoencoder whose bottleneck is too small to copy a lesion through (Baur et al. 2021).

    It has as many levels as the UNet, and `latent_channels` at the lowest resolution: with 8 channels and 128 px, 512
    numbers for 16,384 pixels.

    Args:
        model_channels, channel_mult, norm_groups: as for `UNetModel`; levels are twice as wide, to replace the skips.
        latent_channels: of the bottleneck.
    """

    def __init__(self, model_channels: int, channel_mult: Sequence[int], norm_groups: int, latent_channels: int):
        widths = [2 * model_channels * mult for mult in channel_mult]

        def block(conv: nn.Module, channels: int) -> list[nn.Module]:
            return [conv, nn.GroupNorm(norm_groups, channels), nn.SiLU()]

        layers = block(nn.Conv2d(1, widths[0], 3, padding=1), widths[0])
        for before, width in pairwise(widths):
            layers += block(nn.Conv2d(before, width, 3, stride=2, padding=1), width)
        layers += [nn.Conv2d(widths[-1], latent_channels, 1)]
        layers += block(nn.Conv2d(latent_channels, widths[-1], 1), widths[-1])
        for width, before in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.Upsample(scale_factor=2), *block(nn.Conv2d(width, before, 3, padding=1), before)]
        super().__init__(*layers, nn.Conv2d(widths[0], 1, 3, padding=1))


class AutoencoderBaseline(Method):
    """An autoencoder trained with a mean squared error."""

    fixed = ("score_model.model.", "score_model.baselines.latent_channels")

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        model, latent_channels = score_model.model, score_model.baselines.latent_channels
        return Autoencoder(model.model_channels, model.channel_mult, model.norm_groups, latent_channels)

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        return Objective(translation_losses)


METHOD = AutoencoderBaseline()
