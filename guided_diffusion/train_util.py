"""The training loop: optimizer, learning-rate schedule, EMA, logging, checkpoints."""

import copy
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.device import autocast
from utils.random import keyed_seed

from . import checkpoint, dist_util
from .logger import Logger
from .nn import update_ema
from .resample import ScheduleSampler

Batch = Any


class Stopped(Exception):
    """Training was asked to stop by a signal, and has saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(f"stopped by {received.name}")
        self.received = received


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT only says so in `received`; a second one does its work."""

    def __enter__(self) -> "StopSignals":
        self.received: signal.Signals | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        print(
            f"\n{self.received.name}: this step ends, and is saved; once more ends at once", file=sys.stderr, flush=True
        )


class TrainLoop:
    """Minimises a loss over batches, step by step, and saves what it has learnt.

    Of several processes (`dist_util`), each takes its share of every batch, and the first one writes the files.
    Every step depends on its number alone (the batches and the losses are told which step it is), so training that
    goes on from a checkpoint ends where uninterrupted training would have.

    Settings, all of them numbers:
        iterations: steps in all
        batch_size: samples a step, of all processes together
        lr, weight_decay: AdamW's
        lr_decay_steps, lr_decay_factor: the learning rate is multiplied by the factor once in so many steps
        ema_rate: the rate that the warm-up ends at
        log_interval: steps between two rows of progress.csv
        save_interval: steps between two checkpoints; the last step is always saved
        keep_last: checkpoints that are kept, older ones are removed; 0 keeps all
    """

    def __init__(
        self,
        *,
        model: nn.Module,  # on its device; parameters that do not require gradients are left alone
        compute_losses: Callable[
            [nn.Module, Batch, int], Tensor
        ],  # (model, batch, step) -> losses of this process's share of the batch; the mean over all is minimised
        batches_from: Callable[[int], Iterator[Batch]],  # endless batches from the given step on
        directory: Path,  # where checkpoints are written, and looked for
        logger: Logger,
        settings: Any,  # the attributes named above
        precision: torch.dtype,  # of matrix products and convolutions; float16 with a gradient scaler
        seed: int,  # with the step number, it seeds what the network draws itself (dropout)
        schedule_sampler: ScheduleSampler | None = None,  # whose state is saved, where compute_losses has one
        on_start: Callable[[], None] = lambda: None,  # called before the first step, once all is loaded
        on_save: Callable[[nn.Module, int], None],  # called with the EMA model and the step after each save
    ):
        self.model = model
        self.parallel = nn.parallel.DistributedDataParallel(model) if dist_util.world_size() > 1 else model
        self.ema_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.compute_losses = compute_losses
        self.batches_from = batches_from
        self.directory = directory
        self.logger = logger
        self.settings = settings
        self.precision = precision
        self.seed = seed
        self.schedule_sampler = schedule_sampler
        self.on_start = on_start
        self.on_save = on_save
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        pairs = zip(self.ema_model.parameters(), model.parameters(), strict=True)
        self.averaged = [average for average, parameter in pairs if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.device = self.trained[0].device
        # float16 underflows where gradients are small; the other precisions have the range of float32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.step = 0

    def run(self) -> None:
        """Train from the newest sound checkpoint, or from the beginning, to the last iteration.

        SIGTERM and Ctrl-C end the step that is under way and save; a second one ends the process at once.

        Raises:
            FloatingPointError: the loss or a weight is not finite; the last checkpoint is from before that.
            UnreadableError: there are checkpoints, and none can be read.
            CheckpointError: none can be written.
            Stopped: a signal asked for it, and all is saved.
        """
        settings = self.settings
        self._resume()
        if self.step >= settings.iterations:
            self.logger.info(f"finished already: {self.step} of {settings.iterations} steps")
            return
        if dist_util.rank() == 0:
            self._require_space()
            self.on_start()
        self.model.train()
        loss_sum, since, started = 0.0, self.step, time.monotonic()
        batches = self.batches_from(self.step)
        shown = {"unit": "step", "dynamic_ncols": True, "disable": dist_util.rank() > 0}
        with StopSignals() as signals, tqdm(total=settings.iterations, initial=self.step, **shown) as progress:
            while self.step < settings.iterations:
                # The loss stays on the device until it is logged: asking for its value would hold up a GPU.
                loss_sum = loss_sum + self._train_step(next(batches))
                progress.update()
                stops = dist_util.any_of(signals.received is not None)
                saves = stops or self.step % settings.save_interval == 0 or self.step == settings.iterations
                if not saves and self.step % settings.log_interval:
                    continue
                loss = sum(dist_util.gather(float(loss_sum))) / (self.step - since)
                seconds = time.monotonic() - started
                if not math.isfinite(loss):  # known before anything is saved
                    raise FloatingPointError(f"the loss is {loss} after {self.step} steps")
                values = {
                    "loss": loss,
                    "learning_rate": self._learning_rate(self.step - 1),
                    "images_per_second": (self.step - since) * settings.batch_size / seconds,
                }
                self.logger.scalars(self.step, values)
                progress.set_postfix(loss=f"{loss:.4f}")
                if saves and not all(parameter.isfinite().all() for parameter in self.trained):
                    raise FloatingPointError(f"the weights are not finite after {self.step} steps")
                if saves and dist_util.rank() == 0:
                    self._save()
                if stops:
                    received = next(filter(None, dist_util.gather(signals.received)))  # once all is saved
                    self.logger.info(f"stopped by {received.name}: the same command goes on from here")
                    raise Stopped(received)
                if saves and dist_util.rank() == 0:
                    self.on_save(self.ema_model, self.step)
                loss_sum, since, started = 0.0, self.step, time.monotonic()

    def _train_step(self, batch: Batch) -> Tensor:
        torch.manual_seed(keyed_seed("dropout", self.seed, self.step, dist_util.rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        with autocast(self.device, self.precision):
            losses = self.compute_losses(self.parallel, batch, self.step)
            loss = losses.sum() / self.settings.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over the processes, and are to be summed.
        self.scaler.scale(loss * dist_util.world_size()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Warmed up, so that a short run's average is not one of its initialisation.
        rate = min(self.settings.ema_rate, (1 + self.step) / (10 + self.step))
        update_ema(self.averaged, self.trained, rate)
        self.step += 1
        return loss.detach()

    def _learning_rate(self, step: int) -> float:
        return self.settings.lr * self.settings.lr_decay_factor ** (step // self.settings.lr_decay_steps)

    def _state(self) -> dict[str, Any]:
        """What the next steps depend on, by file. Random numbers are keyed by the step: they have no state."""
        rest = {"step": self.step, "schedule": self.schedule_sampler.state_dict() if self.schedule_sampler else {}}
        rest |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {"model": self.model.state_dict(), "ema": self.ema_model.state_dict(), "opt": rest}

    def _save(self) -> None:
        paths, keep_last = self._paths(self.step), self.settings.keep_last
        checkpoint.save(paths, self._state())
        if keep_last:
            checkpoint.remove_older(self.directory, self.settings.ema_rate, self.step, keep_last)
        self.logger.info(f"saved {paths['ema'].name} after {self.step} steps")

    def _paths(self, step: int) -> dict[str, Path]:
        return checkpoint.paths_of(self.directory, self.settings.ema_rate, step)

    def _resume(self) -> None:
        step = dist_util.broadcast(self._find_checkpoint() if dist_util.rank() == 0 else None)
        if step and dist_util.rank() > 0:
            self._load(step)
        self.logger.rewind(self.step)

    def _find_checkpoint(self) -> int | None:
        """Load the newest sound set; returns its step."""
        for leftover in self.directory.glob("*.pt.tmp"):
            leftover.unlink()
        steps = checkpoint.saved(self.directory)
        for step in reversed(steps):
            try:
                self._load(step)
            except Exception as error:  # damaged, or a state of something else
                said = f"checkpoint {step} cannot be used, trying the one before it: {checkpoint.reason(error)}"
                self.logger.info(f"warning: {said}")
            else:
                self.logger.info(f"going on from opt{step:06d}.pt")
                return step
        if steps:
            raise checkpoint.UnreadableError(f"no checkpoint in {self.directory} can be read")
        return None

    def _load(self, step: int) -> None:
        states = {kind: checkpoint.read_state(path, self.device) for kind, path in self._paths(step).items()}
        self.model.load_state_dict(states["model"])
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError("its weights are not finite")
        self.ema_model.load_state_dict(states["ema"])
        if states["opt"]["step"] != step:
            raise ValueError(f"it holds step {states['opt']['step']}")
        self._load_optimizer(states["opt"]["optimizer"])
        if states["opt"]["scaler"]:  # saved in float16
            self.scaler.load_state_dict(states["opt"]["scaler"])
        if self.schedule_sampler:
            self.schedule_sampler.load_state_dict(states["opt"]["schedule"])
        self.step = step

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load AdamW's state; a ValueError if it does not fit, which torch would only find in the next step."""
        settings = [
            {key: value for key, value in group.items() if key != "lr"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for before, group in zip(settings, self.optimizer.param_groups, strict=True):
            if any(group.get(key) != value for key, value in before.items() if key != "params"):
                raise ValueError("the optimizer has other settings")
        for parameter in self.trained:
            moments = self.optimizer.state.get(parameter, {})
            for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                moment = moments.get(key)
                sound = isinstance(moment, Tensor) and moment.shape == shape and moment.is_floating_point()
                if not sound or not moment.isfinite().all():
                    raise ValueError(f"the optimizer has no sound {key}")

    def _require_space(self) -> None:
        """Raise a CheckpointError now rather than after hours, if the checkpoints to come will not fit on the disk."""
        settings = self.settings
        size = sum(p.nbytes for p in (*self.model.parameters(), *self.ema_model.parameters()))
        size += 2 * sum(p.nbytes for p in self.trained)  # AdamW's two moments
        saves = math.ceil(settings.iterations / settings.save_interval) - self.step // settings.save_interval
        if settings.keep_last:  # and one more while it is written; what lies there takes no more space
            there = len(checkpoint.saved(self.directory))
            saves = min(saves, max(settings.keep_last + 1 - there, 1))
        free = shutil.disk_usage(self.directory).free
        if saves * size > free:
            raise checkpoint.CheckpointError(
                f"{saves} checkpoints of {size / 1e6:.0f} MB will not fit on the disk of {self.directory}, "
                f"where {free / 1e6:.0f} MB are free"
            )
