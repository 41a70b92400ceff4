"""Batches of slices: endless and reproducible for training, all in order for testing."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from utils.random import keyed_generator


class StepSampler:
    """Indices of the batch of every training step, endlessly, from `first_step` on.

    Slices come in a new random order in each epoch. Which ones a step sees is a function of (seed, step) alone, so
    that training can go on from any step.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        seed: int,
        first_step: int,
        share: slice = slice(None),  # the part of each batch that is wanted
    ):
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.first_step = first_step
        self.share = share

    def __iter__(self) -> Iterator[list[int]]:
        epoch, place = divmod(self.first_step * self.batch_size, self.dataset_size)
        order = self._order(epoch)
        while True:
            batch = []
            while len(batch) < self.batch_size:
                if place == self.dataset_size:
                    epoch, place = epoch + 1, 0
                    order = self._order(epoch)
                batch.append(order[place])
                place += 1
            yield batch[self.share]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(
            self.dataset_size, generator=keyed_generator("order", self.seed, epoch)
        ).tolist()


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    first_step: int,
    *,
    share: slice = slice(None),
    workers: int = 0,
) -> Iterator[dict]:
    """Endless batches, dicts of tensors [batch_size, 1, H, W], beginning with that of `first_step`.

    Args:
        dataset: of slices.
        batch_size: of all processes together.
        seed: of the order.
        first_step: number of the first batch.
        share: the part of each batch that is wanted.
        workers: processes that read ahead.
    """
    sampler = StepSampler(len(dataset), batch_size, seed, first_step, share)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and the end of a Slurm job reach all processes, but training still needs its batch when it stops."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def all_slices(dataset: Dataset) -> dict:
    """The whole dataset as one batch: tensors [N, 1, H, W] by kind, and a list of N names."""
    return default_collate([dataset[i] for i in range(len(dataset))])
