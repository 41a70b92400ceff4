"""The UNet: layers against explicit formulas, output shapes, parameter layout, and what affects the output."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.nn import timestep_embedding
from guided_diffusion.unet import AttentionBlock, Downsample, ResBlock, UNetModel, Upsample

PAPER = {
    "in_channels": 2,
    "model_channels": 32,
    "out_channels": 1,
    "num_res_blocks": 2,
    "attention_resolutions": (4, 8, 16),
    "dropout": 0.1,
    "channel_mult": (1, 1, 2, 3, 4),
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "norm_groups": 16,
}


def tiny(**kwargs) -> UNetModel:
    defaults = {
        "in_channels": 1,
        "model_channels": 8,
        "out_channels": 1,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "norm_groups": 4,
    }
    return UNetModel(**{**defaults, **kwargs}).eval()


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


# ----------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("max_period", [10_000, 50])
def test_timestep_embedding(dim, max_period):
    t = np.array([0, 1, 37, 999.5])
    frequencies = max_period ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(np.outer(t, frequencies)), np.sin(np.outer(t, frequencies))], axis=1)
    embedding = timestep_embedding(torch.from_numpy(t), dim, max_period)
    assert embedding.shape == (4, dim)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding[:, :8].numpy(), expected, atol=2e-4)  # float32 angles up to 1,000
    assert not embedding[:, 8:].any()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_softmax_attention(randomise, normal, heads):
    block = randomise(AttentionBlock(12, heads, norm_groups=3))
    x = normal(2, 12, 3, 5)
    normed = F.group_norm(x, 3, block.norm.weight, block.norm.bias).reshape(2, 12, 15)
    qkv = torch.einsum("oc,nct->not", block.qkv.weight[:, :, 0], normed) + block.qkv.bias[:, None]
    attended = []
    for head in qkv.chunk(heads, dim=1):  # q, k and v of each head are adjacent
        q, k, v = head.chunk(3, dim=1)
        scores = torch.einsum("nct,ncs->nts", q, k) / math.sqrt(12 / heads)
        attended.append(torch.einsum("nts,ncs->nct", scores.softmax(-1), v))
    out = torch.einsum("oc,nct->not", block.proj_out.weight[:, :, 0], torch.cat(attended, dim=1))
    expected = x + (out + block.proj_out.bias[:, None]).reshape(x.shape)
    torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(expected, x, atol=1e-2)


def test_channels_must_be_divisible_by_heads():
    with pytest.raises(ValueError, match="12 channels are not divisible"):
        AttentionBlock(12, 5, norm_groups=3)


@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
@pytest.mark.parametrize("with_emb", [True, False])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_residual_block(randomise, normal, use_scale_shift_norm, with_emb, resample):
    """h = conv(silu(norm(x))), then FiLM or a sum with the embedding, the same again, plus a 1×1 convolution of x."""
    resampler = {None: None, "up": Upsample(4, False), "down": Downsample(4, False)}[resample]
    block = randomise(ResBlock(4, 10, 6, 0.0, use_scale_shift_norm, 2, resampler))
    x, emb = normal(2, 4, 6, 6), normal(2, 10) if with_emb else None
    resize = {
        None: lambda h: h,
        "up": lambda h: h.repeat_interleave(2, -1).repeat_interleave(2, -2),
        "down": lambda h: h.unflatten(-1, (3, 2)).unflatten(-3, (3, 2)).mean((-1, -3)),
    }[resample]

    h = F.group_norm(x, 2, block.in_layers[0].weight, block.in_layers[0].bias)
    h = F.conv2d(resize(h * h.sigmoid()), block.in_layers[2].weight, block.in_layers[2].bias, padding=1)
    projected = torch.zeros(2, 12 if use_scale_shift_norm else 6)
    if with_emb:
        projected = (emb * emb.sigmoid()) @ block.emb_layers[1].weight.T + block.emb_layers[1].bias
    projected = projected[:, :, None, None]
    if not use_scale_shift_norm:
        h = h + projected
    h = F.group_norm(h, 2, block.out_layers[0].weight, block.out_layers[0].bias)
    if use_scale_shift_norm:
        h = h * (1 + projected[:, :6]) + projected[:, 6:]
    h = F.conv2d(h * h.sigmoid(), block.out_layers[3].weight, block.out_layers[3].bias, padding=1)
    skip = F.conv2d(resize(x), block.skip_connection.weight, block.skip_connection.bias)
    torch.testing.assert_close(block(x, emb), skip + h)


def test_residual_block_of_equal_width_is_initially_the_identity(normal):
    x = normal(2, 4, 6, 6)
    assert torch.equal(ResBlock(4, 10, 4, 0.0, True, 2).eval()(x, normal(2, 10)), x)


def test_resampling_with_a_convolution(randomise, normal):
    x = normal(1, 3, 4, 6)
    up, down = randomise(Upsample(3, True)), randomise(Downsample(3, True))
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))
    every_pixel = F.conv2d(x, down.op.weight, down.op.bias, padding=1)
    torch.testing.assert_close(down(x), every_pixel[:, :, ::2, ::2])


# ----------------------------------------------------------------------------------------------------------
# Network

VARIANTS = {
    "plain": {},
    "average pooling": {"conv_resample": False},
    "residual resampling": {"resblock_updown": True},
    "FiLM": {"use_scale_shift_norm": True},
    "three levels, two channels": {"channel_mult": (1, 2, 3), "in_channels": 2, "out_channels": 3},
    "heads": {"num_heads": 2, "attention_resolutions": (1, 2)},
    "two blocks": {"num_res_blocks": 2, "dropout": 0.5},
    "no attention but in the middle": {"attention_resolutions": ()},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


def test_untrained_network_returns_0(variant, normal):
    network = tiny(**variant)
    for timesteps in (None, torch.tensor([3, 500])):
        out = network(normal(2, variant.get("in_channels", 1), 8, 12), timesteps)
        assert out.shape == (2, variant.get("out_channels", 1), 8, 12)
        assert not out.any()


def test_every_parameter_has_a_gradient_with_timesteps(variant, normal, randomise):
    network = randomise(tiny(**variant))
    out = network(normal(2, variant.get("in_channels", 1), 8, 8), torch.tensor([3, 500]))
    (out * normal(*out.shape)).sum().backward()
    idle = [
        name
        for name, parameter in network.named_parameters()
        if (parameter.grad is None or not parameter.grad.abs().max() > 1e-6)
    ]
    assert idle == []


def test_output_depends_on_each_samples_timestep(variant, normal, randomise):
    network, x = randomise(tiny(**variant)), normal(1, variant.get("in_channels", 1), 8, 8).repeat(2, 1, 1, 1)
    out = network(x, torch.tensor([3, 500]))
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    torch.testing.assert_close(out.flip(0), network(x, torch.tensor([500, 3])), rtol=1e-4, atol=1e-5)


def test_time_embedding_is_unused_without_timesteps(variant, normal, randomise):
    network, x = randomise(tiny(**variant)), normal(2, variant.get("in_channels", 1), 8, 8)
    t = torch.tensor([3, 500])
    before = network(x), network(x, t)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "time_embed" in name or "emb_layers" in name:
                parameter.add_(1.0)
    assert torch.equal(network(x), before[0])
    assert not torch.allclose(network(x, t), before[1], atol=1e-3)
    assert not torch.allclose(*before, atol=1e-3)


def test_samples_are_independent(normal, randomise):
    network, x = randomise(tiny()), normal(3, 1, 8, 8)
    t = torch.tensor([1, 20, 300])
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, t), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timesteps", [None, torch.tensor([3, 999])])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_weights(normal, randomise, timesteps, autocast):
    """The output has the input's precision, and autocast neither casts the norms nor is needed."""
    network, x = randomise(tiny(use_scale_shift_norm=True, resblock_updown=True)), normal(2, 1, 8, 8)
    expected = network(x, timesteps)
    low = network.bfloat16()
    seen = []
    for module in low.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = low(x, timesteps)
    assert found.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()
    assert not torch.equal(found, expected)


def test_dropout_is_only_active_in_training(normal, randomise):
    network, x = randomise(tiny(dropout=0.5)), normal(1, 1, 8, 8)
    assert torch.equal(network(x), network(x))
    torch.manual_seed(0)
    network.train()
    assert not torch.allclose(network(x), network(x), atol=1e-3)


@pytest.mark.parametrize("size", [(8, 10), (6, 8), (7, 8)])
def test_indivisible_image_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"\(\d+, \d+\) is not a multiple of 4"):
        tiny(channel_mult=(1, 2, 2))(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("kwargs", [{"norm_groups": 3}, {"norm_groups": 16}, {"num_heads": 3}])
def test_indivisible_widths_are_refused(kwargs):
    with pytest.raises(ValueError, match="divisible"):
        tiny(**kwargs)


# ----------------------------------------------------------------------------------------------------------
# Parameters


def test_parameters_are_named_as_in_the_public_library():
    shapes = {name: tuple(value.shape) for name, value in tiny().state_dict().items()}
    expected = {
        "time_embed.0.weight": (32, 8),
        "time_embed.2.bias": (32,),
        "input_blocks.0.0.weight": (8, 1, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (8,),
        "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (8, 32),
        "input_blocks.1.0.out_layers.0.bias": (8,),
        "input_blocks.1.0.out_layers.3.weight": (8, 8, 3, 3),
        "input_blocks.2.0.op.weight": (8, 8, 3, 3),
        "input_blocks.3.0.skip_connection.weight": (16, 8, 1, 1),
        "input_blocks.3.1.norm.weight": (16,),
        "input_blocks.3.1.qkv.weight": (48, 16, 1),
        "input_blocks.3.1.proj_out.bias": (16,),
        "middle_block.0.in_layers.2.weight": (16, 16, 3, 3),
        "middle_block.1.qkv.bias": (48,),
        "middle_block.2.out_layers.3.weight": (16, 16, 3, 3),
        "output_blocks.0.0.in_layers.0.weight": (32,),
        "output_blocks.1.0.skip_connection.weight": (16, 24, 1, 1),
        "output_blocks.1.2.conv.weight": (16, 16, 3, 3),
        "output_blocks.3.0.in_layers.2.weight": (8, 16, 3, 3),
        "out.0.weight": (8,),
        "out.2.weight": (1, 8, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert {name.split(".")[0] for name in shapes} == {
        "time_embed",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "out",
    }
    assert not any("middle_block.0.skip_connection" in name for name in shapes)


def test_residual_resampling_is_named_as_in_the_public_library():
    shapes = {name: tuple(v.shape) for name, v in tiny(resblock_updown=True).state_dict().items()}
    assert shapes["input_blocks.2.0.in_layers.2.weight"] == (8, 8, 3, 3)
    assert shapes["output_blocks.1.2.out_layers.3.weight"] == (16, 16, 3, 3)
    assert not any("op" in name.split(".") or "conv" in name.split(".") for name in shapes)


def test_resampling_without_a_convolution_has_no_parameters():
    names = tiny(conv_resample=False).state_dict().keys()
    assert not any(name.startswith(("input_blocks.2.", "output_blocks.1.2.")) for name in names)


def count_by_hand(
    in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, channel_mult, **other
):
    """Return the number of parameters of the architecture of Dhariwal & Nichol 2021."""
    film = 2 if other.get("use_scale_shift_norm") else 1
    emb = 4 * model_channels
    widths = [model_channels * mult for mult in channel_mult]
    last = len(widths) - 1

    def conv(inside, outside, kernel=3):
        return inside * outside * kernel**2 + outside

    def residual(inside, outside):
        skip = conv(inside, outside, 1) if inside != outside else 0
        norms = 2 * inside + 2 * outside
        embedding = conv(emb, film * outside, 1)
        return norms + conv(inside, outside) + embedding + conv(outside, outside) + skip

    def attention(width):
        return 2 * width + conv(width, 3 * width, 1) + conv(width, width, 1)

    def resample(width):
        return residual(width, width) if other.get("resblock_updown") else conv(width, width)

    total = conv(model_channels, emb, 1) + conv(emb, emb, 1) + conv(in_channels, widths[0])
    width, skips = widths[0], [widths[0]]
    for level in range(last + 1):
        for _ in range(num_res_blocks):
            total += residual(width, widths[level])
            width = widths[level]
            total += attention(width) * (2**level in attention_resolutions)
            skips.append(width)
        if level < last:
            total += resample(width)
            skips.append(width)
    total += 2 * residual(width, width) + attention(width)
    for level in range(last, -1, -1):
        for _ in range(num_res_blocks + 1):
            total += residual(width + skips.pop(), widths[level])
            width = widths[level]
            total += attention(width) * (2**level in attention_resolutions)
        if level > 0:
            total += resample(width)
    return total + 2 * width + conv(width, out_channels)


PUBLIC = [  # counted once in the public library
    ({**PAPER, "in_channels": 1, "num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}, 826_337),
    ({**PAPER, "num_heads": 2, "attention_resolutions": (2, 4), "channel_mult": (1, 1, 2)}, 1_395_457),
    (
        {
            "in_channels": 1,
            "model_channels": 32,
            "out_channels": 2,
            "num_res_blocks": 1,
            "attention_resolutions": (2,),
            "channel_mult": (1, 2),
        },
        701_634,
    ),
]


@pytest.mark.parametrize(("kwargs", "count"), [*PUBLIC, (PAPER, 6_600_257)])
def test_number_of_parameters(kwargs, count):
    assert count_by_hand(**kwargs) == count
    assert sum(parameter.numel() for parameter in UNetModel(**kwargs).parameters()) == count
