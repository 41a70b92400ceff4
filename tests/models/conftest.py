"""Small networks that the tests share."""

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
    """Return the settings of a network small enough for tests."""
    return MODEL


@pytest.fixture
def masked_unet(randomise) -> MaskedConditionalUNet:
    """Return the network in eval mode, with all of its weights random."""
    return randomise(MaskedConditionalUNet(**MODEL), seed=1)


@pytest.fixture
def translator(randomise) -> UNetTranslator:
    """Return the network in eval mode, with all of its weights random."""
    return randomise(UNetTranslator(**MODEL), seed=2)
