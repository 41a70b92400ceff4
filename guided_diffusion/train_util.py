"""Training loop: optimizer, learning-rate schedule, EMA, logging and checkpoints."""

import copy
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.random import keyed_seed

from . import checkpoint, dist_util
from .logger import Logger
from .resample import ScheduleSampler
from .train_step import TrainStep

Batch = Any


class Stopped(Exception):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, received: signal.Signals):
        super().__init__(f"stopped by {received.name}")
        self.received = received


class StopSignals:
    """Context manager that records the first SIGTERM or SIGINT in `received`; a second one has its usual effect."""

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
        print(f"\n{self.received.name}: saving after this step; repeat to quit at once", file=sys.stderr, flush=True)


class TrainLoop:
    """Training loop that minimises the mean loss of each batch and saves checkpoints.

    With several processes (`dist_util`), each computes its share of every batch, and rank 0 writes the files. Batches
    and random numbers depend only on the step number, so a resumed run gives the same result as an uninterrupted one.

    Attributes of `settings`, all numbers:
        iterations: total number of steps
        batch_size: samples per step, over all processes
        lr, weight_decay: learning rate and weight decay of AdamW
        lr_decay_steps, lr_decay_factor: every lr_decay_steps steps, the learning rate is multiplied by lr_decay_factor
        ema_rate: EMA decay after warm-up
        log_interval: steps between rows of progress.csv
        save_interval: steps between checkpoints; the last step is always saved
        keep_last: number of newest checkpoints to keep; 0 keeps all
    """

    def __init__(
        self,
        *,
        model: nn.Module,  # on its device; parameters that require no gradients are not trained
        compute_losses: Callable[..., Tensor],  # (model, *inputs) -> this process's losses, without waiting for a value
        batches_from: Callable[[int], Iterator[Batch]],  # infinite iterator over this process's batches from a step on
        inputs_of: Callable[[Batch, int], Sequence[Tensor]],  # (batch, step) -> inputs on the device, of fixed shapes
        directory: Path,  # where checkpoints are written and looked for
        logger: Logger,
        settings: Any,  # see above
        precision: torch.dtype,  # of matrix products and convolutions; float16 uses a gradient scaler
        seed: int,  # seeds dropout, together with the step number
        compile_for: int = 0,  # samples of this process over which compiling the model pays; 0: do not compile
        schedule_sampler: ScheduleSampler | None = None,  # sampler used in compute_losses, to checkpoint its state
        on_start: Callable[[], None] = lambda: None,  # called on rank 0 after loading, before the first step
        on_save: Callable[[nn.Module, int], None],  # called on rank 0 after each save, with the EMA model and the step
    ):
        self.model = model
        self.ema_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.train_step = TrainStep(
            model=model,
            ema_model=self.ema_model,
            compute_losses=compute_losses,
            batch_size=settings.batch_size,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            precision=precision,
            record=schedule_sampler is None or not schedule_sampler.adaptive,
            compile_for=compile_for,
            report=logger.info,
        )
        self.batches_from = batches_from
        self.inputs_of = inputs_of
        self.directory = directory
        self.logger = logger
        self.settings = settings
        self.seed = seed
        self.schedule_sampler = schedule_sampler
        self.on_start = on_start
        self.on_save = on_save
        self.step = 0

    def run(self) -> None:
        """Train to the last iteration, from the newest usable checkpoint or from scratch.

        SIGTERM and Ctrl-C stop training after the current step and save; a second one ends the process at once.

        Raises:
            FloatingPointError: if the loss or a weight is not finite. Nothing is saved after that.
            UnreadableError: if there are checkpoints but none can be read.
            CheckpointError: if a checkpoint cannot be written.
            Stopped: if a signal stopped training, after saving.
        """
        settings = self.settings
        self._resume()
        if self.step >= settings.iterations:
            self.logger.info(f"already finished: {self.step} of {settings.iterations} steps")
            return
        if dist_util.rank() == 0:
            self._check_disk_space()
            self.on_start()
        self.train_step.train()
        loss_sum, since, started = 0.0, self.step, time.monotonic()
        batches = self.batches_from(self.step)
        shown = {"unit": "step", "dynamic_ncols": True, "disable": dist_util.rank() > 0}
        with StopSignals() as signals, tqdm(total=settings.iterations, initial=self.step, **shown) as progress:
            while self.step < settings.iterations:
                # Keep the loss on the device until it is logged: reading its value would stall the GPU.
                loss_sum = loss_sum + self._train_step(next(batches))
                progress.update()
                stops = dist_util.any_of(signals.received is not None)
                saves = stops or self.step % settings.save_interval == 0 or self.step == settings.iterations
                if not saves and self.step % settings.log_interval:
                    continue
                loss = sum(dist_util.gather(float(loss_sum))) / (self.step - since)
                seconds = time.monotonic() - started
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} after {self.step} steps")
                values = {
                    "loss": loss,
                    "learning_rate": self._learning_rate(self.step - 1),
                    "images_per_second": (self.step - since) * settings.batch_size / seconds,
                }
                self.logger.scalars(self.step, values)
                progress.set_postfix(loss=f"{loss:.4f}")
                if saves and not all(parameter.isfinite().all() for parameter in self.train_step.trained):
                    raise FloatingPointError(f"the weights are not finite after {self.step} steps")
                if saves and dist_util.rank() == 0:
                    self._save()
                if stops:
                    received = next(filter(None, dist_util.gather(signals.received)))  # waits for rank 0 to save
                    self.logger.info(f"stopped by {received.name}: run the same command again to resume")
                    raise Stopped(received)
                if saves and dist_util.rank() == 0:
                    self.on_save(self.ema_model, self.step)
                loss_sum, since, started = 0.0, self.step, time.monotonic()

    def _train_step(self, batch: Batch) -> Tensor:
        # Warm up the EMA, so that in short runs it is not dominated by the initialisation.
        ema_rate = min(self.settings.ema_rate, (1 + self.step) / (10 + self.step))
        loss = self.train_step(
            self.inputs_of(batch, self.step),
            seed=keyed_seed("dropout", self.seed, self.step, dist_util.rank()),
            lr=self._learning_rate(self.step),
            ema_rate=ema_rate,
        )
        self.step += 1
        return loss

    def _learning_rate(self, step: int) -> float:
        return self.settings.lr * self.settings.lr_decay_factor ** (step // self.settings.lr_decay_steps)

    def _state(self) -> dict[str, Any]:
        """Return the contents of each checkpoint file. Random numbers are keyed by step and need no state."""
        rest = {"step": self.step, "schedule": self.schedule_sampler.state_dict() if self.schedule_sampler else {}}
        rest |= self.train_step.state_dict()
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
        step = dist_util.broadcast(self._load_newest() if dist_util.rank() == 0 else None)
        if step and dist_util.rank() > 0:
            self._load(step)
        self.logger.rewind(self.step)

    def _load_newest(self) -> int | None:
        """Load the newest usable checkpoint and return its step, or None if there is none."""
        for leftover in self.directory.glob("*.pt.tmp"):
            leftover.unlink()
        steps = checkpoint.list_checkpoints(self.directory)
        for step in reversed(steps):
            try:
                self._load(step)
            except Exception as error:  # damaged, or of another model
                reason = checkpoint.reason(error)
                self.logger.info(f"warning: checkpoint {step} cannot be used, trying the previous one: {reason}")
            else:
                self.logger.info(f"resuming from opt{step:06d}.pt")
                return step
        if steps:
            raise checkpoint.UnreadableError(f"no checkpoint in {self.directory} can be read")
        return None

    def _load(self, step: int) -> None:
        states = {kind: checkpoint.read_state(path, self.train_step.device) for kind, path in self._paths(step).items()}
        self.model.load_state_dict(states["model"])
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError("its weights are not finite")
        self.ema_model.load_state_dict(states["ema"])
        if states["opt"]["step"] != step:
            raise ValueError(f"its optimizer state is from step {states['opt']['step']}")
        self.train_step.load_state_dict(states["opt"])
        if self.schedule_sampler:
            self.schedule_sampler.load_state_dict(states["opt"]["schedule"])
        self.step = step

    def _check_disk_space(self) -> None:
        """Raise a CheckpointError before training, not hours into it, if its checkpoints will not fit on the disk."""
        settings = self.settings
        size = sum(p.nbytes for p in (*self.model.parameters(), *self.ema_model.parameters()))
        size += 2 * sum(p.nbytes for p in self.train_step.trained)  # AdamW's two moments
        saves = math.ceil(settings.iterations / settings.save_interval) - self.step // settings.save_interval
        if settings.keep_last:  # plus the one being written, minus existing ones
            existing = len(checkpoint.list_checkpoints(self.directory))
            saves = min(saves, max(settings.keep_last + 1 - existing, 1))
        free = shutil.disk_usage(self.directory).free
        if saves * size > free:
            raise checkpoint.CheckpointError(
                f"{saves} checkpoints of {size / 1e6:.0f} MB will not fit on the disk of {self.directory}: "
                f"{free / 1e6:.0f} MB are free"
            )
