"""Fixtures for the tests of the training loop and its checkpoints."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tiny_regression import batches_from, squared_error
from torch import nn

from guided_diffusion.logger import Logger
from guided_diffusion.train_util import TrainLoop

SETTINGS = {
    "iterations": 6,
    "batch_size": 8,
    "lr": 0.05,
    "weight_decay": 0.0,
    "lr_decay_steps": 1000,
    "lr_decay_factor": 0.5,
    "ema_rate": 0.9,
    "log_interval": 2,
    "save_interval": 2,
    "keep_last": 0,
}


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


@pytest.fixture
def train(tmp_path) -> Callable[..., TrainLoop]:
    """Return a function that trains `model` in tmp_path, or a folder below it, and returns the loop.

    Its `compute_losses` also gets the step: (model, batch, step).
    """

    def run(model, folder=".", on_save=None, compute_losses=squared_error, **kwargs):
        directory = tmp_path / folder
        logger = Logger(directory)
        options = {
            "model": model,
            "compute_losses": lambda model, x, y, step: compute_losses(model, (x, y), step.item()),
            "inputs_of": lambda batch, step: (*batch, torch.tensor(step)),
            "batches_from": batches_from,
            "directory": directory,
            "logger": logger,
            "precision": torch.float32,
            "seed": 0,
            "on_save": (lambda network, step: on_save(logger, network, step)) if on_save else lambda *_: None,
        }
        settings = SETTINGS | {key: kwargs.pop(key) for key in SETTINGS.keys() & kwargs}
        loop = TrainLoop(**{**options, **kwargs}, settings=SimpleNamespace(**settings))
        try:
            loop.run()
        finally:
            logger.close()
        return loop

    return run
