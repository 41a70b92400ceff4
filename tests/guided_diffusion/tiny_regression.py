"""A linear regression that trains in milliseconds."""

import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

TRUTH = torch.tensor([[1.0], [-2.0], [0.5]])


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 3, generator=generator)
    return x, x @ TRUTH


def batches_from(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    return (batch_of(i) for i in itertools.count(step))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    x, y = batch
    return (model(x) - y).square().flatten(1).mean(1)


class Stop(Exception):
    """Raised to abort a run without cleanup, as a power cut would."""


def stopping_at(last: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Return a `batches_from` that raises Stop when step `last` requests its batch."""

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in itertools.count(step):
            if i == last:
                raise Stop
            yield batch_of(i)

    return batches


def with_dropout(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 1))


def flat(model: nn.Module) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "progress.csv").open() as file:
        return list(csv.DictReader(file))
