"""Random numbers keyed by their purpose, for results independent of order, batching and device."""

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """Return a 64-bit seed hashed from the key: different keys give independent streams."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(*key))
