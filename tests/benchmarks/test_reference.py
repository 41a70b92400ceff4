"""The benchmarks' plain reference computes the same as the project's own code."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.shared.reference import plain_ddim, plain_mmccd, plain_network, plain_optimizer, plain_training_step
from guided_diffusion.logger import NullLogger
from guided_diffusion.nn import Dropout
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import AttentionBlock
from models.cyclic_unet import UNetTranslator
from models.masked_diffusion import (
    MaskedConditionalUNet,
    MaskedDiffusionTranslator,
    draw_masked_diffusion,
    masked_condition,
    masked_diffusion_losses,
)
from models.masks import sweep
from models.mmccd import mmccd, slices_and_bands

SIZE, WIDTH = 16, 4
BANDS = sweep(SIZE, 2)
STEPS = [0, 3, 20, 39]
MODEL = {
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "norm_groups": 4,
}


def largest_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert got.isfinite().all()
    return float((got - want).detach().abs().max())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def denoiser(randomise) -> nn.Module:
    """A network in the memory layout used for scoring."""
    return randomise(MaskedConditionalUNet(**MODEL), seed=1).to(memory_format=torch.channels_last)


@pytest.fixture
def backward(randomise) -> nn.Module:
    return randomise(UNetTranslator(**MODEL), seed=2).to(memory_format=torch.channels_last)


@pytest.fixture
def make_translator(make_diffusion):
    def make(network: nn.Module) -> MaskedDiffusionTranslator:
        diffusion, sampling = make_diffusion(40, use_timesteps=STEPS), {"seed": 0, "use_ddim": True, "eta": 0.0}
        return MaskedDiffusionTranslator(network, diffusion, image_size=SIZE, band_width=WIDTH, **sampling)

    return make


@pytest.fixture
def brainmask(small_brains) -> torch.Tensor:
    """Masks of three small brains, and a fourth slice without brain."""
    return torch.cat([small_brains, torch.zeros_like(small_brains[:1])])


# ----------------------------------------------------------------------------------------------------------
# Networks


def network_inputs() -> tuple:
    x_t, image, noise = normal(3, 5, 1, SIZE, SIZE)
    mask = torch.zeros(5, 1, SIZE, SIZE, dtype=torch.bool)
    mask[:, :, 4:8] = True
    return x_t, torch.tensor([0, 1, 20, 500, 999]), masked_condition(image, mask, noise)


@torch.no_grad()
def test_the_plain_network_is_the_same_function(denoiser, backward):
    for network, inputs in ((denoiser, network_inputs()), (backward, (normal(5, 1, SIZE, SIZE),))):
        want = network(*inputs)
        assert want.std() > 0.1  # not constant
        assert largest_difference(plain_network(network)(*inputs), want) < 1e-5


def test_the_plain_network_uses_no_optimised_modules(denoiser, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a fused kernel")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
    plain = plain_network(denoiser)
    plain(*network_inputs())
    kinds = {type(module) for module in plain.modules()}
    assert nn.Dropout in kinds
    assert not kinds & {Dropout, AttentionBlock}
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


def test_the_plain_network_is_a_copy_in_the_same_mode(denoiser):
    plain = plain_network(denoiser.train())
    assert all(module.training for module in plain.modules())
    assert not any(module.training for module in plain_network(denoiser.eval()).modules())
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in denoiser.parameters()}
    assert {Dropout, AttentionBlock} < {type(module) for module in denoiser.modules()}


def test_plain_dropout_has_the_same_probability(randomise):
    plain = plain_network(MaskedConditionalUNet(**MODEL, dropout=0.3))
    assert {module.p for module in plain.modules() if isinstance(module, nn.Dropout)} == {0.3}


# ----------------------------------------------------------------------------------------------------------
# Scoring


def test_plain_scores_equal_those_of_mmccd(denoiser, backward, make_translator, brainmask):
    image = normal(4, 1, SIZE, SIZE, seed=3)
    translator = make_translator(denoiser)
    want = mmccd(image, brainmask, translator, backward, bands=BANDS, batch_size=7).error
    got = plain_mmccd(image, brainmask, make_translator(plain_network(denoiser)), plain_network(backward), BANDS)
    assert largest_difference(got, want) < 1e-4
    assert want[:3].flatten(1).std(1).min() > 0.1  # every slice with a brain has scores
    assert (want[1] == 0).any()  # pixels that no band covered


def test_plain_scoring_needs_the_same_number_of_passes(denoiser, backward, make_translator, brainmask):
    batches = {"forward": [], "backward": []}
    forward = make_translator(plain_network(denoiser))
    forward.model.register_forward_pre_hook(lambda model, inputs: batches["forward"].append(len(inputs[0])))
    backward = plain_network(backward)
    backward.register_forward_pre_hook(lambda model, inputs: batches["backward"].append(len(inputs[0])))
    plain_mmccd(normal(4, 1, SIZE, SIZE), brainmask, forward, backward, BANDS)
    samples = len(slices_and_bands(brainmask, forward, BANDS))
    assert samples < 3 * len(BANDS)  # some bands are skipped
    assert sum(batches["forward"]) == samples * len(STEPS)
    assert sum(batches["backward"]) == samples
    assert max(batches["backward"]) > 1  # a band is translated for several slices in one batch


def test_the_plain_translation_equals_the_translators(denoiser, make_translator):
    translator = make_translator(denoiser)
    image, band = normal(1, 1, SIZE, SIZE), BANDS[3]
    x_T, noise = (translator._noise(band, use)[None] for use in ("x_T", "condition"))
    condition = masked_condition(image, translator.mask([band]), noise)
    steps = plain_ddim(plain_network(denoiser), translator.diffusion, x_T, condition)
    assert torch.equal(steps[0], x_T)
    assert len(steps) == len(STEPS) + 1
    with torch.no_grad():
        assert largest_difference(steps[-1], translator.sample(image, [band])) < 1e-4
    assert steps[-1].std() > 0.1


# ----------------------------------------------------------------------------------------------------------
# Training


def test_plain_training_steps_equal_those_of_the_loop(make_diffusion, tmp_path):
    diffusion = make_diffusion(40)
    batch = normal(2, 3, 1, SIZE, SIZE)

    process = {"schedule_sampler": create_named_schedule_sampler("uniform", diffusion)}
    band = {"image_size": SIZE, "band_width": WIDTH, "band_stride": 2}

    def inputs_of(batch, step):
        return *batch, *draw_masked_diffusion(step, seed=0, batch_size=3, **band, **process)

    def losses(model, image, target, *draws):
        return masked_diffusion_losses(model, image, target, draws, diffusion=diffusion, **process)

    torch.manual_seed(0)
    network = MaskedConditionalUNet(**MODEL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # a zero layer would hide the layers before it
    training = {"lr": 1e-2, "weight_decay": 0.1}  # large enough to matter in one step
    ema_rate = 0.15
    model = plain_network(network).train()
    ema_model = copy.deepcopy(model)
    optimizer = plain_optimizer(model, **training)
    loop = TrainLoop(
        model=network.train(),
        compute_losses=losses,
        inputs_of=inputs_of,
        batches_from=lambda step: itertools.repeat(batch),
        directory=tmp_path,
        logger=NullLogger(),
        settings=SimpleNamespace(batch_size=3, lr_decay_steps=1000, lr_decay_factor=0.5, ema_rate=ema_rate, **training),
        precision=torch.float32,
        seed=0,
        on_save=lambda network, step: None,
    )
    before = copy.deepcopy(network)
    for step in range(2):
        inputs = inputs_of(batch, step)
        loss = plain_training_step(model, ema_model, optimizer, losses, inputs, step, ema_rate)
        assert loss.item() == pytest.approx(loop._train_step(batch).item(), abs=1e-5)
        for plain, own, start in ((model, loop.model, before), (ema_model, loop.ema_model, before)):
            for (name, got), (_, want), (_, initial) in zip(
                plain.named_parameters(), own.named_parameters(), start.named_parameters(), strict=True
            ):
                assert largest_difference(initial, want) > 2e-3, name  # the parameter was trained
                # A key's bias does not affect attention: its gradient is a rounding error, which AdamW scales up.
                if not name.endswith("qkv.bias"):
                    assert largest_difference(got, want) < 1e-4, name


def test_the_plain_optimizer_is_not_fused_and_skips_frozen_parameters(backward):
    optimizer = plain_optimizer(plain_network(backward), 1e-4, 0.0)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is False
    assert optimizer.defaults["foreach"] is False
    trained = [parameter for parameter in backward.parameters() if parameter.requires_grad]
    assert len(optimizer.param_groups[0]["params"]) == len(trained) < len(list(backward.parameters()))
