"""The training loop: optimizer, learning-rate schedule, EMA, logging, checkpoints."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .logger import Logger
from .nn import update_ema

Batch = Any


class TrainLoop:
    """Minimises a loss over batches, step by step, and saves what it has learnt.

    Every step depends on its number alone (the batches and the losses are told which step it is), so training that
    goes on from a checkpoint ends where uninterrupted training would have.
    """

    def __init__(
        self,
        *,
        model: nn.Module,  # on its device; parameters that do not require gradients are left alone
        compute_losses: Callable[
            [nn.Module, Batch, int], Tensor
        ],  # (model, batch, step) -> [N], the mean is minimised
        batches_from: Callable[[int], Iterator[Batch]],  # endless batches from the given step on
        directory: Path,  # where checkpoints are written, and looked for
        logger: Logger,
        iterations: int,  # steps in all
        batch_size: int,  # samples a step, for the figure of images a second
        lr: float,  # AdamW's learning rate at the start
        weight_decay: float,  # AdamW's
        lr_decay_steps: int,  # the learning rate is multiplied by lr_decay_factor once in so many steps
        lr_decay_factor: float,
        ema_rate: float,  # the rate that the warm-up ends at
        precision: torch.dtype,  # of matrix products and convolutions; float16 with a gradient scaler
        seed: int,  # with the step number, it seeds what the network draws itself (dropout)
        log_interval: int,  # steps between two rows of progress.csv
        save_interval: int,  # steps between two checkpoints; the last step is always saved
        on_save: Callable[[nn.Module, int], None],  # called with the EMA model and the step after each save
    ):
        self.model = model
        self.ema_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.compute_losses = compute_losses
        self.batches_from = batches_from
        self.directory = directory
        self.logger = logger
        self.iterations = iterations
        self.batch_size = batch_size
        self.lr = lr
        self.lr_decay_steps = lr_decay_steps
        self.lr_decay_factor = lr_decay_factor
        self.ema_rate = ema_rate
        self.precision = precision
        self.seed = seed
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.on_save = on_save
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=weight_decay, fused=True)
        self.device = self.trained[0].device
        # float16 underflows where gradients are small; the other precisions have the range of float32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.step = 0

    def run(self) -> None:
        """Train from the newest checkpoint, or from the beginning, to the last iteration.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self._resume()
        if self.step >= self.iterations:
            self.logger.info(f"finished already: {self.step} of {self.iterations} steps")
            return
        self.model.train()
        loss_sum, since, started = 0.0, self.step, time.monotonic()
        progress = tqdm(total=self.iterations, initial=self.step, unit="step", dynamic_ncols=True)
        batches = self.batches_from(self.step)
        while self.step < self.iterations:
            # The loss stays on the device until it is logged: asking for its value would hold up a GPU.
            loss_sum = loss_sum + self._train_step(next(batches))
            progress.update()
            saves = self.step % self.save_interval == 0 or self.step == self.iterations
            if not saves and self.step % self.log_interval:
                continue
            loss, seconds = float(loss_sum) / (self.step - since), time.monotonic() - started
            if not math.isfinite(loss):  # known before anything is saved
                progress.close()
                raise FloatingPointError(f"the loss is {loss} after {self.step} steps")
            values = {
                "loss": loss,
                "learning_rate": self._learning_rate(self.step - 1),
                "images_per_second": (self.step - since) * self.batch_size / seconds,
            }
            self.logger.scalars(self.step, values)
            progress.set_postfix(loss=f"{loss:.4f}")
            if saves:
                self._save()
                self.on_save(self.ema_model, self.step)
            loss_sum, since, started = 0.0, self.step, time.monotonic()
        progress.close()

    def _train_step(self, batch: Batch) -> Tensor:
        torch.manual_seed(self.seed + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.compute_losses(self.model, batch, self.step).mean()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Warmed up, so that a short run's average is not one of its initialisation.
        update_ema(self.ema_model, self.model, min(self.ema_rate, (1 + self.step) / (10 + self.step)))
        self.step += 1
        return loss.detach()

    def _learning_rate(self, step: int) -> float:
        return self.lr * self.lr_decay_factor ** (step // self.lr_decay_steps)

    def _paths(self, step: int) -> dict[str, Path]:
        return {
            "model": self.directory / f"model{step:06d}.pt",
            "ema": self.directory / f"ema_{self.ema_rate}_{step:06d}.pt",
            "opt": self.directory / f"opt{step:06d}.pt",
        }

    def _save(self) -> None:
        paths = self._paths(self.step)
        torch.save(self.model.state_dict(), paths["model"])
        torch.save(self.ema_model.state_dict(), paths["ema"])
        # The optimizer's file comes last: where it lies, the other two are whole.
        torch.save(
            {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()},
            paths["opt"],
        )
        self.logger.info(f"saved {paths['ema'].name} after {self.step} steps")

    def _resume(self) -> None:
        steps = [int(path.stem.removeprefix("opt")) for path in self.directory.glob("opt*.pt")]
        if not steps:
            return
        paths = self._paths(max(steps))
        self.model.load_state_dict(torch.load(paths["model"], map_location=self.device, weights_only=True))
        self.ema_model.load_state_dict(torch.load(paths["ema"], map_location=self.device, weights_only=True))
        saved = torch.load(paths["opt"], map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.logger.info(f"going on from {paths['opt'].name}")
