"""Rows as bench.whole_models writes them."""

import math


def case_row(mechanism, tokens, over, size="S", mode="forward", **seconds):
    """A case, with the median of each treatment and of its ratio over softmax's."""
    ratio = {name: {"median": value} for name, value in over.items()}
    spent = {name: {"median": value} for name, value in seconds.items()}
    return {
        "mechanism": mechanism, "size": size, "tokens": tokens, "mode": mode,
        "resolution": math.isqrt(tokens) * 16, "over_softmax": ratio, "seconds": spent,
        "missing": {}, "batch": 1, "peak_memory": 0,
    }  # fmt: skip
