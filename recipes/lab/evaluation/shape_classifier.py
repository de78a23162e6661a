"""The exact classifier of generated shapes: no training, any resolution.

An image is split into two colors; area and centroid of the lighter one give scale and center
under each class; all classes (and rotations, where the level has them) are rendered exactly and
the best overlap decides. What the data guarantee can thus be asked of every image: the class that
was wanted, the overlap with a legal picture, one color per object, parameters spread as in the
data, and in "long-range" two distant objects that agree.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from recipes.lab.data.shapes import CLASS_NAMES, DARK_GRAY, PALETTE, ShapeParameters, coverage

ROTATIONS = 48  # of the level "hard"
_TEMPLATE_SIDE = 256
_CHUNK_PIXELS = 2**18  # at once; more do not fit a processor's cache
Floats = NDArray[np.float64]


class Judgement(NamedTuple):
    """What the classifier reads from n images of k objects each.

    Attributes:
        classes: (n, k) int64, best class of each object.
        iou: (n,) overlap of the whole image with its nearest legal picture, 0 to 1.
        purity: (n,) share of the color variance that two colors explain, 0 to 1.
        palette: (n, k) int64, nearest color of the palette of each object.
        center: (n, k, 2) in [-1, 1].
        scale: (n, k).
    """

    classes: NDArray[np.int64]
    iou: Floats
    purity: Floats
    palette: NDArray[np.int64]
    center: Floats
    scale: Floats


def classify_shapes(images: NDArray[np.uint8], level: str) -> Judgement:
    """Reads images as pictures of ``recipes.lab.data.shapes``.

    Args:
        images: (n, h, h, 3) uint8.
        level: One of ``recipes.lab.data.shapes.LEVELS``.

    Returns:
        One judgement of all images.
    """
    size = max(1, _CHUNK_PIXELS // images.shape[1] ** 2)
    parts = [
        _classify_chunk(images[start : start + size].astype(np.float64) / 127.5 - 1, level)
        for start in range(0, len(images), size)
    ]
    return Judgement(*map(np.concatenate, zip(*parts, strict=True)))


def shape_scores(
    generated: Judgement, labels: NDArray[np.int64], real: Judgement, level: str
) -> dict[str, float]:
    """The numbers of a set of images; higher is better for all.

    Args:
        generated: Judgement of generated images.
        labels: (n,) the classes that were asked for.
        real: Judgement of real images of the same resolution: its mean overlap is the ceiling.
        level: As for ``classify_shapes``.

    Returns:
        "class_accuracy" (share of objects of the class that was asked for), "iou" and
        "iou_of_ceiling", "purity", "parameter_coverage" (1 minus the mean distance of the laws of
        center, scale and color from the real ones), and for "long-range" the shares of images
        whose two objects agree: "agreement_class", "agreement_colour", "agreement" (both).
    """
    scores = {
        "class_accuracy": float((generated.classes == labels[:, None]).mean()),
        "iou": float(generated.iou.mean()),
        "iou_of_ceiling": float(generated.iou.mean() / real.iou.mean()),
        "purity": float(generated.purity.mean()),
        "parameter_coverage": _parameter_coverage(generated, real, level),
    }
    if level == "long-range":
        same_class = generated.classes[:, 0] == generated.classes[:, 1]
        same_color = generated.palette[:, 0] == generated.palette[:, 1]
        scores |= {
            "agreement_class": float(same_class.mean()),
            "agreement_colour": float(same_color.mean()),
            "agreement": float((same_class & same_color).mean()),
        }
    return scores


def _parameter_coverage(generated: Judgement, real: Judgement, level: str) -> float:
    def laws(found: Judgement) -> Floats:
        return np.concatenate([found.center.reshape(len(found.iou), -1), found.scale], 1).T

    distances = [
        float(ks_2samp(a, b, method="asymp")[0])  # pyright: ignore
        for a, b in zip(laws(generated), laws(real), strict=True)
    ]
    if level != "hard":  # there the colors are free
        one, other = (
            np.bincount(found.palette.ravel(), minlength=len(PALETTE)) / found.palette.size
            for found in (generated, real)
        )
        distances.append(np.abs(one - other).sum() / 2)
    return float(1 - np.mean(distances))


def _classify_chunk(pixels: Floats, level: str) -> Judgement:
    side = pixels.shape[1]
    background, covered, purity = _two_colors(pixels)
    masks = _object_masks(covered, level)  # (n, k, h, w)
    rotations = 2 * np.pi * np.arange(ROTATIONS) / ROTATIONS if level == "hard" else np.zeros(1)
    count, objects = masks.shape[:2]
    classes, palette = np.zeros((2, count, objects), np.int64)
    center, scale = np.zeros((count, objects, 2)), np.zeros((count, objects))
    union, best = np.zeros((count, side, side)), np.zeros(count)
    for index in range(objects):
        part = covered * masks[:, index]
        mass, middle = _mass_and_centroid(part)
        best = np.full(count, -1.0)
        for label in range(len(CLASS_NAMES)):
            for rotation in rotations:
                shown, place, size = _fitted(mass, middle, label, rotation, side)
                overlap = _iou(part, shown * masks[:, index])
                better = overlap > best
                best[better] = overlap[better]
                classes[better, index] = label
                center[better, index] = place[better]
                scale[better, index] = size[better]
        palette[:, index] = _palette_color(pixels, part, background)
        if objects > 1:
            shown = _drawn(classes[:, index], center[:, index], scale[:, index], 0.0, side)
            union = np.maximum(union, shown)
    # A single object fills its mask, so that its best overlap is that of the image.
    iou = best if objects == 1 else _iou(covered, union)
    return Judgement(classes, iou, purity, palette, center, scale)


def _fitted(
    mass: Floats, middle: Floats, label: int, rotation: float, side: int
) -> tuple[NDArray[np.float32], Floats, Floats]:
    """The object of this class and rotation with this area and centroid: pixels, center, scale."""
    area, centroid = _template(label)
    scale = np.clip(np.sqrt(mass * (2 / side) ** 2 / area), 0.05, 1.5)
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    center = middle - scale[:, None] * (turn @ centroid)
    return _drawn(np.full(len(mass), label), center, scale, rotation, side), center, scale


@lru_cache(maxsize=len(CLASS_NAMES))
def _template(label: int) -> tuple[float, Floats]:
    """Area and centroid of a class at scale 1."""
    side, scale = _TEMPLATE_SIDE, 0.9
    alone = _drawn(np.array([label]), np.zeros((1, 2)), np.array([scale]), 0.0, side)
    mass, middle = _mass_and_centroid(alone.astype(np.float64))
    return float(mass[0] * (2 / side) ** 2 / scale**2), middle[0] / scale


def _drawn(
    labels: NDArray[np.int64], center: Floats, scale: Floats, rotation: float, side: int
) -> NDArray[np.float32]:
    """Coverage (n, side, side) of one object per image; center is (n, 2), scale (n,)."""
    turned, no_color = np.full((len(labels), 1), rotation), np.zeros((len(labels), 3))
    shown = ShapeParameters(labels, center[:, None], scale[:, None], turned, no_color, no_color)
    return coverage(shown, side)


def _mass_and_centroid(part: Floats) -> tuple[Floats, Floats]:
    """Covered pixels (n,) and their mean place (n, 2) in [-1, 1]."""
    side = part.shape[1]
    ticks = (2 * np.arange(side) + 1) / side - 1
    mass = part.sum((1, 2))
    safe = np.maximum(mass, 1e-9)
    x = (part.sum(1) @ ticks) / safe
    y = -(part.sum(2) @ ticks) / safe  # row 0 is the top
    return mass, np.stack([x, y], 1)


def _two_colors(
    pixels: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Background color (n, 3), coverage (n, h, w) and purity (n,) of a two-color reading."""
    light = pixels.mean(-1)
    low, high = light.min((1, 2), keepdims=True), light.max((1, 2), keepdims=True)
    is_object = light > (low + high) / 2
    background = _mean_color(pixels, ~is_object)
    # Pixels at the edge are mixtures: the object's own color shows in its lightest third.
    foreground = _mean_color(pixels, light > low + 0.75 * (high - low))
    axis = foreground - background
    length = np.maximum((axis**2).sum(-1), 1e-9)
    along = np.einsum("nhwc,nc->nhw", pixels - background[:, None, None], axis)
    covered = np.clip(along / length[:, None, None], 0, 1)
    model = background[:, None, None] + covered[..., None] * axis[:, None, None]
    unexplained = ((pixels - model) ** 2).sum((1, 2, 3))
    total = ((pixels - pixels.mean((1, 2), keepdims=True)) ** 2).sum((1, 2, 3))
    return background, covered, np.clip(1 - unexplained / np.maximum(total, 1e-9), 0, 1)


def _mean_color(pixels: Floats, mask: NDArray[np.bool_]) -> Floats:
    weight = mask[..., None].astype(np.float64)
    return (pixels * weight).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1)


def _palette_color(pixels: Floats, part: Floats, background: Floats) -> NDArray[np.int64]:
    weight = np.where(part > 0.75 * part.max((1, 2), keepdims=True), part, 0)[..., None]
    color = (pixels * weight).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1e-9)
    # By direction from the background, so that a pale object keeps its color.
    direction = color - background
    directions = PALETTE - DARK_GRAY
    cosine = direction @ directions.T
    cosine /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9)
    return (cosine / np.linalg.norm(directions, axis=1)).argmax(1)


def _object_masks(covered: Floats, level: str) -> Floats:
    """Where each object may lie, (n, k, h, w): everywhere, or two opposite quarters."""
    count, side = covered.shape[:2]
    if level != "long-range":
        return np.ones((count, 1, side, side))
    near, far = np.arange(side) < side // 2, np.arange(side) >= side // 2
    quarters = np.stack(
        [np.outer(near, near), np.outer(near, far), np.outer(far, near), np.outer(far, far)]
    ).astype(np.float64)
    mass = (covered[:, None] * quarters).sum((2, 3))
    is_falling = mass[:, 0] + mass[:, 3] >= mass[:, 1] + mass[:, 2]  # upper left, lower right
    return np.where(is_falling[:, None, None, None], quarters[[0, 3]], quarters[[1, 2]])


def _iou(one: Floats, other: Floats) -> Floats:
    union = np.maximum(one, other).sum((1, 2))
    return np.minimum(one, other).sum((1, 2)) / np.maximum(union, 1e-9)
