"""Batches of slices: endless and reproducible for training, all in order for testing."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.random import keyed_generator


def step_indices(
    dataset_size: int, batch_size: int, seed: int, first_step: int, share: slice = slice(None)
) -> Iterator[list[int]]:
    """Indices of the batch of every training step, endlessly, from `first_step` on; of each batch the given share.

    Slices come in a new random order in each epoch. Which ones a step sees is a function of (seed, step) alone, so
    that training can go on from any step.
    """
    epoch, place = divmod(first_step * batch_size, dataset_size)
    order: list[int] = []
    while True:
        while len(order) < place + batch_size:
            generator = keyed_generator("order", seed, epoch)
            order += torch.randperm(dataset_size, generator=generator).tolist()
            epoch += 1
        yield order[place : place + batch_size][share]
        order, place = order[place + batch_size :], 0


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    first_step: int,
    *,
    share: slice = slice(None),
    workers: int = 0,
    pinned: bool = False,
) -> Iterator[dict]:
    """Endless batches, dicts of tensors [batch_size, 1, H, W], beginning with that of `first_step`.

    Args:
        dataset: of slices.
        batch_size: of all processes together.
        seed: of the order.
        first_step: number of the first batch.
        share: the part of each batch that is wanted.
        workers: processes that read ahead.
        pinned: in memory that a GPU copies from while the host goes on.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=step_indices(len(dataset), batch_size, seed, first_step, share),
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pinned,
    )
    return iter(loader)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and the end of a Slurm job reach all processes, but training still needs its batch when it stops."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def all_slices(dataset: Dataset) -> dict:
    """The whole dataset as one batch: tensors [N, 1, H, W] by kind, and a list of N names."""
    return default_collate([dataset[i] for i in range(len(dataset))])
