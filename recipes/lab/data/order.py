"""Which images a step sees: a pure function of the seed and the step."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.lab.data.checks import DataError, check_seed, is_integer
from recipes.lab.data.datasets import ImageDataset


def batch_indices(
    dataset: ImageDataset, seed: int, step: int, batch_size: int, kept: Tensor | None = None
) -> Tensor:
    """Return the indices of the images of one training step, a pure function of the arguments.

    A finite set is passed through in a new order each epoch, without a gap between epochs: a
    batch may span two of them, or more where it is larger than the set. An infinite set gives
    each image once, in order, whatever the seed.

    Args:
        dataset: any data set.
        seed: of the order, in [0, 2**64).
        step: from 0.
        batch_size: at least 1.
        kept: (n,) the images of a finite set to draw from; None draws from all.

    Returns:
        (batch_size,) int64.

    Raises:
        DataError: for a seed, step or batch size out of range.
    """
    seed = check_seed(seed)
    for name, value, least in (("step", step, 0), ("batch size", batch_size, 1)):
        if not is_integer(value) or value < least:
            raise DataError(
                f"{name} {value!r} is out of range: give an integer of at least {least}"
            )
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    if dataset.infinite:
        return torch.from_numpy(positions)
    length = len(dataset) if kept is None else len(kept)
    epochs, places = np.divmod(positions, length)
    parts = [permutation(length, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    chosen = torch.from_numpy(np.concatenate(parts))
    return chosen if kept is None else kept[chosen]


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(length,) indices in an order that no library's version changes."""
    # numpy promises a stable raw stream, but not a stable Generator.permutation.
    philox = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(philox.random_raw(length), kind="stable").astype(np.int64)
