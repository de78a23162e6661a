"""The data sets, one file each: what is imported here can be named by ``--data``."""

from recipes.lab.data import digits, emoji, fashion_mnist, folder, hub, shapes

__all__ = ["digits", "emoji", "fashion_mnist", "folder", "hub", "shapes"]
