"""Procedural pictures of ten shapes: no files, any resolution, exactly known contents.

A picture is a pure function of ``(seed, split, index, level)``. Its parameters come from the
counter-based generator Philox4x32-10 in integer arithmetic, so that they are the same on every
machine and numpy version, and none of them depends on the resolution.

Coordinates: the image covers [-1, 1] x [-1, 1], x to the right and y upwards. Every shape fits
into a circle of radius ``scale`` about its center. Colors are RGB in [-1, 1].

All draws are independent and uniform; ``_LEVELS`` holds the ranges. ``long-range`` has two
objects: the first is the upper one, left or right with equal odds, the second lies in the corner
diagonally opposite. Both have the class that is the label, and one color; jitter and scale are
drawn apart. A generated image is therefore wrong, whatever its label, when its objects disagree in
class or color. At 16 pixels an object is about six pixels wide; 32 pixels show the class clearly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.lab.data.datasets import SPLITS, ImageDataset, Request, register_dataset

MINIMUM_RESOLUTION = 8
TEST_IMAGES = 1000

PALETTE = np.array(
    [[0.9, -0.2, -0.4], [-0.3, 0.8, -0.1], [-0.2, 0.3, 1.0], [1.0, 0.8, -0.3]], dtype=np.float64
)
DARK_GRAY = np.array([-0.8, -0.8, -0.8], dtype=np.float64)


@dataclass(frozen=True)
class _Level:
    """How pictures of one level are drawn, in image units.

    Attributes:
        center_jitter: Greatest offset of x and of y from the middle, or from the corner.
        scale: Least and largest.
        corner: Where the two objects lie, +-corner in x and y; 0 draws one in the middle.
        rotated: Whether by any angle; else none.
        free_colors: Whether each channel is drawn, U(0.1, 1) on U(-1, -0.3); else the object has
            a color of ``PALETTE``, on ``DARK_GRAY``.
    """

    center_jitter: float
    scale: tuple[float, float]
    corner: float = 0.0
    rotated: bool = False
    free_colors: bool = False


_LEVELS = {
    "easy": _Level(center_jitter=0.075, scale=(0.55, 0.65)),
    "medium": _Level(center_jitter=0.25, scale=(0.40, 0.65)),
    "hard": _Level(center_jitter=0.25, scale=(0.40, 0.65), rotated=True, free_colors=True),
    "long-range": _Level(center_jitter=0.04, scale=(0.34, 0.40), corner=0.55),
}
LEVELS = tuple(_LEVELS)


@dataclass(frozen=True)
class ShapeParameters:
    """Everything that is drawn in ``n`` pictures of ``k`` objects each.

    Attributes:
        labels: (n,) int64, position in ``CLASS_NAMES``; all objects of a picture share it.
        center: (n, k, 2) float64, x and y of each object, image units.
        scale: (n, k) float64, radius of the circle that encloses the object, image units.
        rotation: (n, k) float64, anticlockwise, radians.
        foreground: (n, 3) float64, RGB in [-1, 1].
        background: (n, 3) float64, RGB in [-1, 1].
    """

    labels: NDArray[np.int64]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    rotation: NDArray[np.float64]
    foreground: NDArray[np.float64]
    background: NDArray[np.float64]


_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _philox(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10 (Salmon et al. 2011), vectorized; every word is 32 bits held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _WORD,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _WORD,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


_NUM_BLOCKS = 4


def _random_words(seed: int, split: str, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sixteen 32-bit words for each index, (16, n).

    The split is a word of the counter, so that two splits can never share a stream.
    """
    low = np.broadcast_to(indices & _WORD, (_NUM_BLOCKS, len(indices)))
    high = np.broadcast_to(indices >> _HALF, low.shape)
    block = np.broadcast_to(np.arange(_NUM_BLOCKS, dtype=np.uint64)[:, None], low.shape)
    which = np.full(low.shape, SPLITS.index(split), dtype=np.uint64)
    words = _philox((low, high, block, which), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=1).reshape(4 * _NUM_BLOCKS, len(indices))


def shape_parameters(seed: int, split: str, indices: Any, level: str = "easy") -> ShapeParameters:
    """Draw the parameters of the pictures with the given indices.

    Args:
        seed: integer in [0, 2**64).
        split: one of ``SPLITS``; the streams of two splits are disjoint.
        indices: (n,) integers in [0, 2**63), an array or a CPU tensor.
        level: one of ``LEVELS``.

    Returns:
        Parameters of n pictures; k = 2 objects for ``long-range``, else k = 1.
    """
    law = _LEVELS[level]
    words = _random_words(seed, split, np.asarray(indices, dtype=np.int64).astype(np.uint64))
    # The half keeps the draws strictly inside (0, 1) and the sum is exact in float64.
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32

    labels = (words[0] * np.uint64(len(CLASS_NAMES)) >> _HALF).astype(np.int64)
    if law.free_colors:
        foreground = 0.1 + 0.9 * uniform[1:4].T
        background = -1.0 + 0.7 * uniform[4:7].T
    else:
        foreground = PALETTE[words[1] * np.uint64(len(PALETTE)) >> _HALF]
        background = np.tile(DARK_GRAY, (len(labels), 1))

    num_objects = 2 if law.corner else 1
    # Words 8 to 10 belong to the first object, 12 to 14 to the second.
    objects = uniform[8 : 8 + 4 * num_objects].reshape(num_objects, 4, -1).transpose(2, 0, 1)
    center = law.center_jitter * (2.0 * objects[:, :, :2] - 1.0)
    if law.corner:
        side = np.where(uniform[11] < 0.5, -law.corner, law.corner)
        center[:, 0] += np.stack([side, np.full_like(side, law.corner)], axis=-1)
        center[:, 1] -= np.stack([side, np.full_like(side, law.corner)], axis=-1)
    smallest, largest = law.scale
    scale = smallest + (largest - smallest) * objects[:, :, 2]
    rotation = np.zeros_like(scale)
    if law.rotated:
        rotation[:] = 2.0 * math.pi * uniform[7][:, None]
    return ShapeParameters(labels, center, scale, rotation, foreground, background)


Field = NDArray[np.float32]


def _disc(x: Field, y: Field, radius: float) -> Field:
    return np.sqrt(x * x + y * y) - np.float32(radius)


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    dx = np.abs(x) - np.float32(half_width)
    dy = np.abs(y) - np.float32(half_height)
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0)


def _star(x: Field, y: Field, points: int, inner: float) -> Field:
    """Distance to a star with one tip upwards at radius 1 and notches at radius ``inner``.

    All edges are mirror images of the one between the tip and the first notch, so each point is
    mirrored into that sector. With ``inner = cos(pi / points)`` it is the regular polygon.
    """
    half_sector = math.pi / points
    sine, cosine = np.float32(math.sin(half_sector)), np.float32(math.cos(half_sector))
    x = np.abs(x)
    for _ in range(points // 2):
        beyond = 2 * np.maximum(x * cosine - y * sine, 0)
        x = np.abs(x - beyond * cosine)
        y = y + beyond * sine
    edge_x, edge_y = inner * sine, inner * cosine - 1
    y = y - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.sqrt((x - along * edge_x) ** 2 + (y - along * edge_y) ** 2)
    return np.copysign(distance, edge_x * y - edge_y * x)


_DISTANCES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": lambda x, y: _disc(x, y, 0.95),
    "ring": lambda x, y: np.abs(_disc(x, y, 0.74)) - np.float32(0.23),
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "triangle": lambda x, y: _star(x, y, 3, math.cos(math.pi / 3)),
    "hexagon": lambda x, y: _star(x, y, 6, math.cos(math.pi / 6)),
    "star": lambda x, y: _star(x, y, 5, 0.42),
    "plus": lambda x, y: np.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "crescent": lambda x, y: np.maximum(_disc(x, y, 0.95), -_disc(x - np.float32(0.48), y, 0.75)),
    "bar": lambda x, y: _box(x, y, 0.95, 0.28),
    "dumbbell": lambda x, y: np.minimum(
        _disc(np.abs(x) - np.float32(0.6), y, 0.38), _box(x, y, 0.6, 0.14)
    ),
}
CLASS_NAMES = tuple(_DISTANCES)


def coverage(parameters: ShapeParameters, resolution: int) -> NDArray[np.float32]:
    """Share of each pixel that is covered by an object.

    It is ``clamp(0.5 - distance * resolution / 2, 0, 1)`` for the signed distance at the center
    of the pixel, and the largest of the objects' values.

    Returns:
        (n, resolution, resolution) float32 in [0, 1]; row 0 is the top.
    """
    num_images, num_objects = parameters.scale.shape
    ticks = ((2 * np.arange(resolution) + 1) / resolution - 1).astype(np.float32)
    labels = np.repeat(parameters.labels, num_objects)
    center = parameters.center.reshape(-1, 2).astype(np.float32)
    scale = parameters.scale.reshape(-1, 1, 1).astype(np.float32)
    cosine = np.cos(parameters.rotation).reshape(-1, 1, 1).astype(np.float32)
    sine = np.sin(parameters.rotation).reshape(-1, 1, 1).astype(np.float32)
    covered = np.empty((len(labels), resolution, resolution), dtype=np.float32)
    for label, name in enumerate(CLASS_NAMES):
        chosen = np.flatnonzero(labels == label)
        if not len(chosen):
            continue
        size = scale[chosen]
        right = (ticks[None, None, :] - center[chosen, 0, None, None]) / size
        up = (-ticks[None, :, None] - center[chosen, 1, None, None]) / size
        x: Any = right * cosine[chosen] + up * sine[chosen]
        y: Any = up * cosine[chosen] - right * sine[chosen]
        pixels = _DISTANCES[name](x, y) * (size * np.float32(resolution / 2))
        covered[chosen] = np.clip(np.float32(0.5) - pixels, 0, 1)
    return covered.reshape(num_images, num_objects, resolution, resolution).max(axis=1)


def render(parameters: ShapeParameters, resolution: int) -> NDArray[np.float32]:
    """Draw pictures, anti-aliased: (n, 3, resolution, resolution) float32 in [-1, 1]."""
    covered = coverage(parameters, resolution)[:, None]
    background = parameters.background.astype(np.float32)[:, :, None, None]
    foreground: Any = parameters.foreground.astype(np.float32)[:, :, None, None]
    return background + covered * (foreground - background)


@register_dataset("shapes")
class Shapes(ImageDataset):
    """Pictures of ten shapes, drawn when asked for: endless to train on, 1000 to test with."""

    resolutions = (MINIMUM_RESOLUTION, None)
    default_resolution = 16
    channels = 3
    class_names = CLASS_NAMES
    levels = LEVELS
    accuracy_floor = 0.95
    is_drawn = True

    def __init__(self, request: Request) -> None:
        self.resolution = request.resolution_of(self, "shapes")
        self.split, self.seed, self.level = request.split, request.seed, request.level
        self.infinite = request.split == "train"

    def __len__(self) -> int:
        return super().__len__() if self.infinite else TEST_IMAGES

    def identity(self) -> dict[str, Any]:
        law = f"shapes 1 {self.level} {self.split} {self.resolution}"
        return self._identity("shapes", hashlib.sha256(law.encode()).hexdigest())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        parameters = shape_parameters(self.seed, self.split, indices, self.level)
        images = torch.from_numpy(render(parameters, self.resolution))
        return images, torch.from_numpy(parameters.labels)
