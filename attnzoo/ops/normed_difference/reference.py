"""The normalized difference as it is written."""

from attnzoo.ops.normed_difference.torch import normed_difference

__all__ = ["normed_difference"]
