"""UNet translator: the public UNet without a timestep, with its time embedding frozen."""

import pytest
import torch

from guided_diffusion.unet import UNetModel
from models.cyclic_unet import UNetTranslator, translation_losses


@pytest.fixture
def images() -> torch.Tensor:
    """Return input and target, [2, N, 1, H, W]."""
    return torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def is_time_embedding(name: str) -> bool:
    return "time_embed" in name or "emb_layers" in name


def test_checkpoints_of_the_public_unet_load(translator, model_config, randomise, images):
    public = randomise(UNetModel(in_channels=1, out_channels=1, **model_config), seed=5)
    shapes = {name: value.shape for name, value in public.state_dict().items()}
    assert {name: value.shape for name, value in translator.state_dict().items()} == shapes
    translator.load_state_dict(public.state_dict())
    assert torch.equal(translator(images[0]), public(images[0]))


def test_time_embedding_is_frozen_and_the_rest_is_trained(translator, images):
    translation_losses(translator, *images).mean().backward()
    trained = {name for name, parameter in translator.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in translator.named_parameters()}
    assert everything - trained == {name for name in everything if is_time_embedding(name)}
    assert any("time_embed" in name for name in everything - trained)
    assert any("emb_layers" in name for name in everything - trained)
    without_gradient = [
        name
        for name, parameter in translator.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().max() > 1e-7)
    ]
    assert without_gradient == []


def test_frozen_weights_do_not_affect_the_output(translator, images):
    before = translator(images[0])
    with torch.no_grad():
        for name, parameter in translator.named_parameters():
            if is_time_embedding(name):
                parameter.fill_(3.0)
    assert torch.equal(translator(images[0]), before)


def test_losses_are_the_mean_squared_error_of_each_sample(images):
    losses = translation_losses(lambda image: 2 * image + 1, *images)
    expected = [((2 * image + 1 - target) ** 2).sum().item() / 64 for image, target in zip(*images, strict=True)]
    assert losses.shape == (3,)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_translator_learns_to_invert_the_contrast(images):
    torch.manual_seed(0)
    network = UNetTranslator(
        model_channels=8, num_res_blocks=1, attention_resolutions=(), channel_mult=(1, 2), norm_groups=4
    )
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    first = None
    for _ in range(60):
        loss = translation_losses(network, images[0], -images[0]).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
