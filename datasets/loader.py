"""Batches of slices: an endless, reproducible stream for training, and a whole dataset in order for testing."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.random import keyed_generator


def step_indices(
    dataset_size: int, batch_size: int, seed: int, first_step: int, share: slice = slice(None)
) -> Iterator[list[int]]:
    """Yield the indices of the `share` of each training step's batch, endlessly, starting at `first_step`.

    Slices are reshuffled every epoch. A step's batch depends only on (seed, step), so training can resume at any step.
    """
    epoch, offset = divmod(first_step * batch_size, dataset_size)
    order: list[int] = []
    while True:
        while len(order) < offset + batch_size:
            generator = keyed_generator("order", seed, epoch)
            order += torch.randperm(dataset_size, generator=generator).tolist()
            epoch += 1
        yield order[offset : offset + batch_size][share]
        order, offset = order[offset + batch_size :], 0


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
    """Return an endless iterator over training batches, dicts of `name` and tensors [batch_size, 1, H, W] by kind.

    Args:
        dataset: slices, as in `BraTS2021Dataset`.
        batch_size: total over all processes.
        seed: seed of the order of slices.
        first_step: step of the first batch.
        share: part of each batch to load, for this process.
        workers: number of worker processes that load batches ahead; 0 loads them in this process.
        pinned: load into pinned memory, for asynchronous copies to a GPU.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=step_indices(len(dataset), batch_size, seed, first_step, share),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=pinned,
    )
    return iter(loader)


def ignore_signals(worker: int) -> None:
    """Keep a worker alive on Ctrl-C or when Slurm ends the job: the main process needs its batch to stop cleanly."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def all_slices(dataset: Dataset) -> dict:
    """Return the whole dataset as one batch: tensors [N, 1, H, W] by kind, and a list of N names."""
    return default_collate([dataset[i] for i in range(len(dataset))])
