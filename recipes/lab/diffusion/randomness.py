"""Randomness without a state."""

from __future__ import annotations

import hashlib
import operator

import torch


def generator_for(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the key alone.

    The key is hashed by BLAKE2b, so neighboring keys give unrelated streams on every platform and
    Python version. PyTorch's CPU generator keeps 32 bits of a seed: two of 50,000 keys coincide
    with a chance of about one in four, which matters to no statistic but rules out uniqueness.

    Args:
        key: Integers of any size and sign, such as ``(seed, step, rank)``; order counts.

    Raises:
        TypeError: If a part of the key is not an integer.
    """
    text = ",".join(str(operator.index(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
