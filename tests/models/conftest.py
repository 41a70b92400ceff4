"""Small networks that the tests of the method share."""

import pytest

from models.cyclic_unet import UNetTranslator
from models.masked_diffusion import MaskedConditionalUNet

MODEL = {
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "norm_groups": 4,
}


@pytest.fixture
def model_config() -> dict:
    """What the config says of a network, at a size for tests."""
    return MODEL


@pytest.fixture
def masked_unet(randomise) -> MaskedConditionalUNet:
    """With random weights throughout, in eval mode."""
    return randomise(MaskedConditionalUNet(**MODEL), seed=1)


@pytest.fixture
def translator(randomise) -> UNetTranslator:
    """With random weights throughout, in eval mode."""
    return randomise(UNetTranslator(**MODEL), seed=2)
