"""Random numbers that depend on what they are for, and on nothing else."""

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """A seed of 64 bits made of the whole key: keys that differ give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the whole key, so that draws depend on no order, batching or device."""
    return torch.Generator().manual_seed(keyed_seed(*key))
