"""Gaussian diffusion: forward process and posterior, ancestral and DDIM sampling, training loss.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021, Dhariwal & Nichol 2021. Timesteps run from 0
(least noise) to T − 1; images are [N, C, H, W].
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

Model = Callable[..., Tensor]
StepNoise = Callable[[int], Tensor]


class ModelMeanType(enum.Enum):
    """Quantity predicted by the network."""

    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Variance of a reverse step: the posterior variance (small) or the β of the forward step (large)."""

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()


class LossType(enum.Enum):
    """Training objective."""

    MSE = enum.auto()


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Return the β of every step, float64 [num_diffusion_timesteps].

    `linear`: Ho et al. 2020, 1e-4 … 0.02 over 1000 steps, scaled so that fewer steps end at the same noise level.
    `cosine`: Nichol & Dhariwal 2021, eq. 17, each β at most 0.999.

    Raises:
        ValueError: for any other name.
    """
    n = num_diffusion_timesteps
    if schedule_name == "linear":
        return np.linspace(1000 / n * 1e-4, 1000 / n * 0.02, n, dtype=np.float64)
    if schedule_name == "cosine":
        alpha_bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(n)])
    raise ValueError(f"unknown noise schedule {schedule_name!r}: choose linear or cosine")


class GaussianDiffusion:
    """Forward and reverse process for a given schedule of β.

    A model is any callable `model(x_t, timesteps, **model_kwargs)` that returns a tensor shaped like x_t. Its
    conditioning inputs are passed as `model_kwargs`.

    Args:
        betas: [T], each in (0, 1].
        model_mean_type: quantity predicted by the model.
        model_var_type: variance of the reverse steps.
        loss_type: loss computed by `training_losses`.
        rescale_timesteps: pass timesteps scaled to 0 … 1000 to the model, for any T.

    Raises:
        ValueError: if betas is not one-dimensional or has values outside (0, 1].
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a one-dimensional array of values in (0, 1]")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss = {LossType.MSE: mse_loss}[loss_type]
        self.rescale_timesteps = rescale_timesteps
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        # q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 6 and 7
        one_minus_prev = 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = betas * one_minus_prev / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = one_minus_prev * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        # The posterior variance is 0 at t = 0: use the one at t = 1 for its logarithm.
        after_first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(after_first, self.posterior_variance[1:]))
        self.large_variance = np.append(after_first, betas[1:])
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps to pass to the model for step numbers t [N]; overridden for respaced processes."""
        return t * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) for x_start [N, …] and t [N]; `noise` is standard normal, drawn if None."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal, scale = self._signal_and_noise_scale(t, x_start)
        return signal * x_start + scale * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance (clipped at t = 0) of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 7."""
        mean = self._extract("posterior_mean_coef1", t, x_t) * x_start
        mean = mean + self._extract("posterior_mean_coef2", t, x_t) * x_t
        variance = self._extract("posterior_variance", t, x_t)
        return mean, variance, self._extract("posterior_log_variance_clipped", t, x_t)

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Evaluate the model once for the distribution p(x_{t-1} | x_t) and the predicted x_0.

        Args:
            model: `model(x, timesteps, **model_kwargs)`.
            x: x_t, [N, …].
            t: step numbers, int64 [N].
            clip_denoised: clip the predicted x_0 to [−1, 1].
            model_kwargs: conditioning inputs of the model.

        Returns:
            mean and pred_xstart, [N, …]; variance and log_variance, broadcastable to these.
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        predicts_xstart = self.model_mean_type is ModelMeanType.START_X
        pred_xstart = output if predicts_xstart else self._xstart_from_eps(x, t, output)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, variance, log_variance = self.q_posterior_mean_variance(pred_xstart, x, t)
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            variance = self._extract("large_variance", t, x)
            log_variance = variance.log()
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def p_sample(
        self, model: Model, x: Tensor, t: Tensor, *, noise: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Take one ancestral step x_t → x_{t-1} (no noise is added at t = 0).

        Args:
            model, x, t, kwargs: as in `p_mean_variance`.
            noise: noise to add, standard normal and shaped like x; drawn if None.

        Returns:
            sample and pred_xstart, [N, …].
        """
        out = self.p_mean_variance(model, x, t, **kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        sample = out["mean"] + _nonzero_mask(t, x) * (0.5 * out["log_variance"]).exp() * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model: Model, x: Tensor, t: Tensor, *, eta: float = 0.0, noise: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Take one DDIM step x_t → x_{t-1} (Song et al. 2021, eq. 12); deterministic for eta 0.

        Arguments and result as in `p_sample`. eta ≥ 0 scales the added noise; 1 adds as much as DDPM.
        """
        pred_xstart = self.p_mean_variance(model, x, t, **kwargs)["pred_xstart"]
        alpha_bar = self._extract("alphas_cumprod", t, x)
        alpha_bar_prev = self._extract("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        direction = (1 - alpha_bar_prev - sigma**2).sqrt() * self._eps_from_xstart(x, t, pred_xstart)
        sample = alpha_bar_prev.sqrt() * pred_xstart + direction
        if eta > 0:
            if noise is None:
                noise = torch.randn_like(x)
            sample = sample + sigma * noise  # sigma is 0 at t = 0
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample_loop(self, model: Model, shape: Sequence[int], **kwargs: Any) -> Tensor:
        """Sample x_0 from x_T by ancestral steps; arguments as in `_sample_loop`."""
        return self._sample_loop(self.p_sample, model, shape, **kwargs)

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], *, eta: float = 0.0, **kwargs: Any) -> Tensor:
        """Sample x_0 from x_T by DDIM steps; arguments as in `_sample_loop`, eta as in `ddim_sample`."""
        if eta == 0:
            kwargs["step_noise"] = None
        return self._sample_loop(self.ddim_sample, model, shape, eta=eta, **kwargs)

    def _sample_loop(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        *,
        noise: Tensor | None = None,
        device: torch.device | str | None = None,
        step_noise: StepNoise | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Sample x_0 from x_T.

        Args:
            step: `p_sample` or `ddim_sample`.
            model: as in `p_mean_variance`.
            shape: shape of the samples, [N, …].
            noise: x_T; drawn if None.
            device: device to draw x_T on if `noise` is None.
            step_noise: `step_noise(t)` returns the noise to add at step t; drawn if None.
            kwargs: further arguments of `step` (clip_denoised, model_kwargs, …).
        """
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                t = torch.full((shape[0],), i, device=x.device)
                x = step(model, x, t, noise=step_noise(i) if step_noise else None, **kwargs)["sample"]
        return x

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of one training step.

        Args:
            model, t, model_kwargs: as in `p_mean_variance`.
            x_start: [N, …].
            noise: standard normal, shaped like x_start; drawn if None.

        Returns:
            {"loss": [N]}: the loss of the model's prediction, averaged within each sample.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        return {"loss": self.loss(output, target, reduction="none").flatten(1).mean(1)}

    def _signal_and_noise_scale(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ_t and √(1 − ᾱ_t), the coefficients of x_0 and of the noise in x_t."""
        return self._extract("sqrt_alphas_cumprod", t, like), self._extract("sqrt_one_minus_alphas_cumprod", t, like)

    def _xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        signal, scale = self._signal_and_noise_scale(t, x_t)
        return (x_t - scale * eps) / signal

    def _eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        signal, scale = self._signal_and_noise_scale(t, x_t)
        return (x_t - signal * x_start) / scale

    def _extract(self, schedule: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the values of a schedule at t [N] as float32 [N, 1, …], broadcastable to `like`."""
        return self._schedule_tensor(schedule, t.device)[t].reshape(-1, *[1] * (like.ndim - 1))

    def _schedule_tensor(self, schedule: str, device: torch.device) -> Tensor:
        """Return a schedule as a tensor [T] on the device, cached because a copy in every step would stall a GPU."""
        key = (schedule, device)
        if key not in self._on_device:
            values = torch.as_tensor(getattr(self, schedule))
            self._on_device[key] = (values.float() if values.is_floating_point() else values).to(device)
        return self._on_device[key]


def _nonzero_mask(t: Tensor, like: Tensor) -> Tensor:
    """Return 1 where t > 0 and 0 where t = 0, shaped to broadcast over `like`: the last step adds no noise."""
    return (t > 0).float().reshape(-1, *[1] * (like.ndim - 1))
