"""scikit-learn's handwritten digits, 8 px, in a fixed split of 80 to 20."""

from __future__ import annotations

from typing import Any

import numpy as np

from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ArrayDataset, Request, register_dataset
from recipes.lab.data.order import permutation


@register_dataset("digits")
class Digits(ArrayDataset):
    """1,797 digits in 17 levels of gray."""

    resolutions = (4, 8)
    default_resolution = 8
    class_names = tuple(str(digit) for digit in range(10))
    accuracy_floor = 0.95
    classifier_steps = 200

    def __init__(self, request: Request) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "data 'digits' needs scikit-learn: pip install scikit-learn, or use data 'shapes'"
            ) from error

        digits: Any = load_digits()
        labels = digits.target.astype(np.int64)
        chosen = []
        for label in range(10):
            members = np.flatnonzero(labels == label)
            members = members[permutation(len(members), 0, label)]
            num_test = round(0.2 * len(members))
            is_test = request.split == "test"
            chosen.append(members[:num_test] if is_test else members[num_test:])
        rows = np.sort(np.concatenate(chosen))
        self._hold(request, digits.images[rows].astype(np.uint8), labels[rows], white=16)
