"""UNet of Dhariwal & Nichol 2021 ("ADM"), with or without timestep conditioning.

Parameter names and shapes match the public guided-diffusion library, so that its checkpoints load.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import Dropout, film, timestep_embedding, zero_module


class Upsample(nn.Module):
    """2× nearest-neighbour upsampling, followed by a 3×3 convolution if `use_conv` is set."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """2× downsampling by a 3×3 convolution of stride 2 if `use_conv` is set, else by 2×2 average pooling."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block with optional timestep embedding and optional resampling.

    Arguments as in `UNetModel`. With use_scale_shift_norm, the embedding scales and shifts the second norm's output
    (FiLM) instead of being added; `resample` is a parameterless `Upsample` or `Downsample` for both branches, or None.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        norm_groups: int,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Apply the block to x [N, channels, H, W]; emb is [N, emb_channels], or None without timestep conditioning."""
        norm, activate, conv = self.in_layers
        h = conv(self.resample(activate(norm(x))))
        if emb is None:
            h = self.out_layers(h)
        else:
            emb_out = self.emb_layers(emb)[:, :, None, None].to(h.dtype)
            if self.use_scale_shift_norm:
                h = self.out_layers[1:](film(self.out_layers[0], h, *emb_out.chunk(2, dim=1)))
            else:
                h = self.out_layers(h + emb_out)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions. The channels of `qkv` are ordered by head, then by q, k, v."""

    def __init__(self, channels: int, num_heads: int, norm_groups: int):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels are not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of x [N, C, H, W]."""
        n, c, height, width = x.shape
        # Channels last: positions become matrix rows, the only layout that the fused attention kernels support.
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)
        # [N, T, 3·C] -> three of [N, heads, T, C/heads]
        q, k, v = qkv.reshape(n, height * width, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.reshape(n, height, width, c).permute(0, 3, 1, 2)


class EmbedSequential(nn.Sequential):
    """Sequential module that passes the timestep embedding to its residual blocks."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """UNet with residual blocks, attention at chosen resolutions and optional timestep conditioning.

    Args:
        in_channels: channels of the input.
        model_channels: base width; level i has channel_mult[i] times as many channels.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per level in the encoder (one more in the decoder).
        attention_resolutions: downsampling rates (1, 2, 4, …) with attention after each residual block.
        dropout: probability in [0, 1).
        channel_mult: width multiplier of each level; the resolution is halved between levels.
        conv_resample: resample with a learned convolution, unless resblock_updown is set.
        num_heads: attention heads.
        use_scale_shift_norm: FiLM conditioning on the timestep.
        resblock_updown: resample inside residual blocks.
        norm_groups: groups of every group norm.

    Raises:
        ValueError: if a channel count is not divisible by norm_groups or num_heads.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_heads: int = 1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.model_channels = model_channels
        self.downsampling = 2 ** (len(channel_mult) - 1)
        emb_channels = 4 * model_channels

        def resblock(channels: int, out: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(channels, emb_channels, out, dropout, use_scale_shift_norm, norm_groups, resample)

        def resampler(kind: type[Upsample] | type[Downsample], channels: int) -> nn.Module:
            if resblock_updown:
                return resblock(channels, channels, kind(channels, use_conv=False))
            return kind(channels, use_conv=conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )

        channels = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skip_channels = [channels]
        rate = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                width = int(mult * model_channels)
                layers: list[nn.Module] = [resblock(channels, width)]
                channels = width
                if rate in attention_resolutions:
                    layers.append(AttentionBlock(channels, num_heads, norm_groups))
                self.input_blocks.append(EmbedSequential(*layers))
                skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(EmbedSequential(resampler(Downsample, channels)))
                skip_channels.append(channels)
                rate *= 2

        self.middle_block = EmbedSequential(
            resblock(channels, channels),
            AttentionBlock(channels, num_heads, norm_groups),
            resblock(channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for block in range(num_res_blocks + 1):
                width = int(mult * model_channels)
                layers = [resblock(channels + skip_channels.pop(), width)]
                channels = width
                if rate in attention_resolutions:
                    layers.append(AttentionBlock(channels, num_heads, norm_groups))
                if level > 0 and block == num_res_blocks:
                    layers.append(resampler(Upsample, channels))
                    rate //= 2
                self.output_blocks.append(EmbedSequential(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(norm_groups, channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, H, W]; timesteps are [N], or None to leave them out.

        Activations have the precision of the weights, the output that of x.

        Raises:
            ValueError: if H or W cannot be halved between all levels.
        """
        if any(size % self.downsampling for size in x.shape[-2:]):
            raise ValueError(f"image size {tuple(x.shape[-2:])} is not a multiple of {self.downsampling}")
        precision = self.out[-1].weight.dtype
        # Without autocast, which would convert every group norm's input to float32 and its output back.
        keep = nullcontext() if precision == torch.float32 else torch.autocast(x.device.type, enabled=False)
        with keep:
            emb = None
            if timesteps is not None:
                emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(precision))
            h, skips = x.to(precision), []
            for block in self.input_blocks:
                h = block(h, emb)
                skips.append(h)
            h = self.middle_block(h, emb)
            for block in self.output_blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            return self.out(h).to(x.dtype)  # autocast may have lowered the precision
