"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import dydila, sana, softmax

__all__ = ["dydila", "sana", "softmax"]
