"""Cyclic UNet (Liang et al. 2023, section 2.1): two UNets, A → B and B → A, trained with a mean squared error.

`modality_cycle` in cycle.py chains the two and returns the squared cyclic error, the anomaly score.
"""

from ml_collections import ConfigDict
from torch import Tensor, nn

from guided_diffusion.unet import ResBlock, UNetModel

from .method import Method, Objective


class UNetTranslator(UNetModel):
    """The UNet of guided diffusion without timesteps; both translators of Cyclic UNet, the backward one of MMCCD.

    The time embedding is not used. It stays in the state dict, so that checkpoints of the public library load, and is
    frozen, so that the optimizer and the gradient reduction skip it.
    """

    def __init__(self, **kwargs):
        super().__init__(in_channels=1, out_channels=1, **kwargs)
        self.time_embed.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.emb_layers.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the translation [N, 1, H, W] of `image` [N, 1, H, W]."""
        return super().forward(image)


def translation_losses(network: nn.Module, image: Tensor, target: Tensor, draws: tuple = ()) -> Tensor:
    """Return the squared error of the translation, averaged over each sample: [N] for images [N, 1, H, W]."""
    return (network(image) - target).square().flatten(1).mean(1)


class CyclicUNet(Method):
    """Two UNets, each trained with a mean squared error."""

    def create_network(self, score_model: ConfigDict) -> nn.Module:
        return UNetTranslator(**score_model.model)

    def create_objective(self, config: ConfigDict, share: slice = slice(None)) -> Objective:
        return Objective(translation_losses)


METHOD = CyclicUNet()
