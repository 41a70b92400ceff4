"""Plain scoring and training in float32, one mask at a time, as the reference for speed and correctness.

The project's own code computes the same scores. Networks are computed as in the public guided-diffusion library, whose
attention is a product, a softmax and a product.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.nn import Dropout
from guided_diffusion.unet import AttentionBlock
from models.masked_diffusion import MaskedDiffusionTranslator, masked_condition
from models.masks import Band

# ----------------------------------------------------------------------------------------------------------
# Networks


class PlainAttention(nn.Module):
    """An `AttentionBlock` with the same weights that stores the attention weights of all pairs of positions."""

    def __init__(self, block: AttentionBlock):
        super().__init__()
        self.num_heads = block.num_heads
        self.norm = block.norm
        self.qkv = block.qkv
        self.proj_out = block.proj_out

    def forward(self, x: Tensor) -> Tensor:
        n, c, *spatial = x.shape
        qkv = self.qkv(self.norm(x.reshape(n, c, -1)))
        # [N, 3·C, T] -> three of [N·heads, C/heads, T]: each head's q, k and v are adjacent
        q, k, v = qkv.reshape(n * self.num_heads, 3 * c // self.num_heads, -1).chunk(3, dim=1)
        weights = torch.einsum("nct,ncs->nts", q / math.sqrt(q.shape[1]), k).softmax(dim=-1)
        h = torch.einsum("nts,ncs->nct", weights, v).reshape(n, c, -1)
        return x + self.proj_out(h).reshape(n, c, *spatial)


def plain_network(network: nn.Module) -> nn.Module:
    """Return a copy computed as published: unfused attention, torch's dropout and its default memory layout."""
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AttentionBlock):
                setattr(parent, name, PlainAttention(child))
            elif isinstance(child, Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    return plain.train(network.training)


# ----------------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def plain_mmccd(
    image: Tensor,
    brainmask: Tensor,
    forward: MaskedDiffusionTranslator,
    backward: nn.Module,
    bands: Sequence[Band],
) -> Tensor:
    """Return the MMCCD score [N, 1, H, W] of `models.mmccd.mmccd`, with DDIM at eta 0 without clipping.

    Bands that hide no brain are skipped, so that both versions make the same number of network passes.

    Args:
        image: [N, 1, H, W], on the networks' device; all pass through a band together, as in the published loader.
        brainmask: bool [N, 1, H, W], on the same device.
        forward: provides the network, the diffusion, the masks and the noise.
        backward: the network from the target modality to the image's.
        bands: the sweep.
    """
    errors = []
    for band in bands:
        mask = forward.mask([band]).to(image.device)
        shows = (mask & brainmask).flatten(1).any(1)  # slices with hidden brain
        if not shows.any():
            continue
        noise, x_T = (
            forward._noise(band, use).to(image.device).expand_as(image[shows]) for use in ("condition", "x_T")
        )
        condition = masked_condition(image[shows], mask, noise)
        translation = plain_ddim(forward.model, forward.diffusion, x_T, condition)[-1]
        error = torch.full_like(image, torch.nan)
        error[shows] = torch.where(mask, (image[shows] - backward(translation)).square(), torch.nan)
        errors.append(error)
    # Pixels that no mask covered are background: their mean is nan, their score 0.
    return torch.stack(errors).nanmean(dim=0).nan_to_num(0.0) if errors else torch.zeros_like(image)


@torch.no_grad()
def plain_ddim(model: nn.Module, diffusion: GaussianDiffusion, x_T: Tensor, condition: Tensor) -> Tensor:
    """Return x_T and the result of every DDIM step, [steps + 1, N, 1, H, W]; the last is x_0.

    Song et al. 2021, eq. 12, without noise, for a network that predicts x_0.
    """
    alpha_bars = [1.0, *diffusion.alphas_cumprod.tolist()]
    steps = [x_T]
    for i in reversed(range(diffusion.num_timesteps)):
        x_t, alpha_bar, alpha_bar_before = steps[-1], alpha_bars[i + 1], alpha_bars[i]
        t = diffusion.model_timesteps(torch.full((len(x_T),), i, device=x_T.device))
        x_0 = model(x_t, t, condition)
        noise = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        steps.append(math.sqrt(alpha_bar_before) * x_0 + math.sqrt(1 - alpha_bar_before) * noise)
    return torch.stack(steps)


# ----------------------------------------------------------------------------------------------------------
# Training


def plain_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, neither fused nor grouped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=False, foreach=False)


def plain_training_step(
    model: nn.Module,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute_losses: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    step: int,
    ema_rate: float,
) -> Tensor:
    """Do one training step in float32, in place on `model` and `ema_model`, and return the loss.

    `compute_losses` is `(model, *inputs) -> [N]`; the EMA rate is warmed up to `ema_rate` over the steps, as in
    `TrainLoop`.
    """
    loss = compute_losses(model, *inputs).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rate = min(ema_rate, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, value in zip(ema_model.parameters(), model.parameters(), strict=True):
            average.mul_(rate).add_(value, alpha=1 - rate)
    return loss.detach()
