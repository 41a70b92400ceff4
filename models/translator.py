"""A translator without diffusion: a UNet from one modality to another, trained with a mean squared error."""

from torch import Tensor, nn

from guided_diffusion.unet import ResBlock, UNetModel


class UNetTranslator(UNetModel):
    """The UNet of guided diffusion used without a timestep; both directions of Cyclic UNet, backward of MMCCD.

    Its time embedding has nothing to do: it stays in the state dict, so that checkpoints of the public library
    load, and is frozen here, so that no optimizer and no gradient reduction meets it.
    """

    def __init__(self, **kwargs):
        super().__init__(in_channels=1, out_channels=1, **kwargs)
        self.time_embed.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.emb_layers.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """The translation [N, 1, H, W] of `image` [N, 1, H, W]."""
        return super().forward(image)


def translation_losses(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Squared error of the translation, averaged over each sample: [N] for images [N, 1, H, W]."""
    return (model(image) - target).square().flatten(1).mean(1)
