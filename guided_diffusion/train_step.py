"""A step of training: losses, gradients, AdamW, and the moving average of the weights."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils import compiling, recording
from utils.device import autocast, copy_in_precision

from . import dist_util
from .nn import update_ema


class TrainStep:
    """Computes steps as fast as the device allows; a checkpoint does not depend on how.

    On a GPU, a copy of the model computes losses and gradients. In bfloat16, all its weights are converted at once, and
    the model keeps those that are optimised and saved. Gradients and update are recorded as CUDA graphs, between which
    several processes add up their gradients.

    Raises:
        torch.cuda.OutOfMemoryError: if a step does not fit into memory.
    """

    def __init__(
        self,
        *,
        model: nn.Module,  # on its device; parameters that require no gradients are not trained
        ema_model: nn.Module,  # a copy of it
        compute_losses: Callable[..., Tensor],  # (model, *inputs) -> this process's losses
        batch_size: int,  # over all processes, by which the sum of losses is divided
        lr: float,  # learning rate of AdamW before the first step
        weight_decay: float,
        precision: torch.dtype,  # of matrix products and convolutions; float16 uses a gradient scaler
        record: bool,  # record steps on a GPU; losses that wait for a value cannot be recorded
        compile_for: int,  # samples to come over which compiling the model pays; 0: it does not
        report: Callable[[str], object],  # called with messages
    ):
        self.model, self.network, self.compute_losses, self.batch_size = model, model, compute_losses, batch_size
        self.precision, self.compile_for, self.report = precision, compile_for, report
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        pairs = zip(ema_model.parameters(), model.parameters(), strict=True)
        self.ema_parameters = [average for average, parameter in pairs if parameter.requires_grad]
        self.device = self.trained[0].device
        # Small gradients underflow in float16; the other precisions have the range of float32.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.lr, self.ema_rate, self._last_lr = lr, 0.0, lr
        self.on_gpu = recording.available(self.device)
        if self.on_gpu:
            # Numbers would be fixed in a recorded step.
            self.lr, self.ema_rate = torch.tensor([lr, 0.0], device=self.device).unbind()
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # in plain steps
            self._accelerate(record)
        # One tensor holds all gradients, in fixed memory, where a recorded update and the sum over processes find them.
        self.gradients = torch.zeros(sum(parameter.numel() for parameter in self.trained), device=self.device)
        parts = self.gradients.split([parameter.numel() for parameter in self.trained])
        for parameter, part in zip(self.trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer = torch.optim.AdamW(
            self.trained, self.lr, weight_decay=weight_decay, fused=True, capturable=self.on_gpu
        )

    def __call__(self, inputs: Sequence[Tensor], *, seed: int, lr: float, ema_rate: float) -> Tensor:
        """Take a step and return this process's share of the mean loss.

        Args:
            inputs: arguments of `compute_losses`, on the device, with the same shapes in every step.
            seed: of dropout.
            lr: learning rate.
            ema_rate: EMA decay.
        """
        if self.compile_for:
            call = partial(self._differentiate, inputs=inputs)
            self.network = compiling.compiled(self.network, call, self.compile_for, compiling.TRAINING, self.report)
            self.compile_for = 0
        torch.manual_seed(seed)
        self._last_lr = lr
        if self.on_gpu:
            self.lr.fill_(lr)
            self.ema_rate.fill_(ema_rate)
        else:
            self.optimizer.param_groups[0]["lr"], self.ema_rate = lr, ema_rate
        loss = self._compute_gradients(*inputs)
        dist_util.sum_over_processes(self.gradients)
        self._update()
        return loss

    def _accelerate(self, record: bool) -> None:
        obstacle = "" if record else "the schedule sampler waits for the losses"
        if self.scaler.is_enabled():
            obstacle = "float16 scales its gradients by their size"
        else:
            layout = torch.channels_last if self.compile_for else torch.contiguous_format
            self.network = copy_in_precision(self.model, self.precision).to(memory_format=layout)
        if obstacle:
            self.report(f"training steps are not recorded as CUDA graphs ({obstacle}): slower")
        else:
            self._compute_gradients = recording.Recorded(self._compute_gradients, "gradients", self.report)
            self._update = recording.Recorded(self._update, "the optimizer's step", self.report)

    def _differentiate(self, network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the loss, and its scaled gradients with respect to the trained parameters of `network`."""
        with autocast(self.device, self.precision):
            loss = self.compute_losses(network, *inputs).sum() / self.batch_size
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return loss.detach(), torch.autograd.grad(self.scaler.scale(loss), trained, materialize_grads=True)

    def _compute_gradients(self, *inputs: Tensor) -> Tensor:
        if self.network is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.network.parameters()), list(self.model.parameters()))
        loss, gradients = self._differentiate(self.network, inputs)
        torch._foreach_copy_([parameter.grad for parameter in self.trained], gradients)
        return loss

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        update_ema(self.ema_parameters, self.trained, self.ema_rate)

    def train(self) -> None:
        """Switch the model to training mode."""
        self.model.train()
        self.network.train()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of AdamW and of the gradient scaler, in the form that it has on a CPU."""
        optimizer = self.optimizer.state_dict()
        plain = {"lr": self._last_lr, "capturable": False}
        optimizer["param_groups"] = [group | plain for group in optimizer["param_groups"]]
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state returned by `state_dict`, on any device.

        AdamW's is checked now: torch would notice a mismatch only in the next step.

        Raises:
            ValueError: if its settings differ, or a moment is missing, not finite or of another shape.
        """
        settings = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for before, group in zip(settings, self.optimizer.param_groups, strict=True):
            group.update(lr=before["lr"], capturable=before["capturable"])  # of this device
            if any(group.get(key) != value for key, value in before.items() if key not in ("lr", "params")):
                raise ValueError("its optimizer settings differ")
        for parameter in self.trained:
            moments = self.optimizer.state.get(parameter, {})
            for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                moment = moments.get(key)
                fits = isinstance(moment, Tensor) and moment.shape == shape and moment.is_floating_point()
                if not fits or not moment.isfinite().all():
                    raise ValueError(f"its optimizer state has no valid {key}")
                moments[key] = moment.contiguous()  # as the parameter; a GPU may have saved another layout
        if state["scaler"]:  # saved in float16
            self.scaler.load_state_dict(state["scaler"])
