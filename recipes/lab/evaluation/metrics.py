"""Metrics of generated images, as pure functions of their features, in float64.

FID and sFID are ``frechet`` of pool and spatial features, KID and sKID are ``kid`` of the same.
Lower is better for those four, higher for all others. No metric but ``class_accuracy`` sees the
labels, and precision can be high for noise: read density, coverage and class accuracy beside it.

Sources: Heusel et al. 2017 (FID); Nash et al. 2021 (sFID); Binkowski et al. 2018 (KID); Salimans
et al. 2016 (IS); Kynkäänniemi et al. 2019 (precision, recall) as in ADM's evaluator
(openai/guided-diffusion); Naeem et al. 2020 (density, coverage).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.lab.console import UserError

_TILE = 1024  # rows of a pairwise matrix that are in memory at once
_RANK_TOLERANCE = 1e-12
# Of the largest eigenvalue: what statistics stored in float32 may lack to be a covariance.
_STORED_TOLERANCE = 1e-4


class NotMeasured(UserError):
    """What a metric was given is nothing that it can measure; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of a set of features; sets merge without being together.

    Attributes:
        count: Number n of samples.
        mean: (d,) float64.
        scatter: (d, d) float64, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of (n, d) features."""
        x = _checked(features)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @classmethod
    def of_blocks(cls, blocks: Iterable[Tensor]) -> Moments:
        """Moments of a stream of (n_i, d) blocks, merged in their order.

        The order fixes the rounding: whichever process computed a block, the result is the same
        to the last digit.
        """
        return reduce(Moments.merge, map(Moments.of, blocks))

    @classmethod
    def of_statistics(cls, mean: Tensor, covariance: Tensor) -> Moments:
        """Moments of a stored mean (d,) and covariance (d, d), of a large number of samples.

        Raises:
            NotMeasured: They are no mean and covariance.
        """
        count = 10**9  # the statistics do not say of how many they are
        moments = cls(count, mean.double(), covariance.double() * (count - 1))
        moments.check()
        return moments

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan et al. 1979); no digits are lost to large means."""
        count = self.count + other.count
        step = other.mean - self.mean
        between = torch.outer(step, step) * (self.count * other.count / count)
        mean = self.mean + step * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(d, d), with n - 1 in the denominator as in ADM's evaluator."""
        if self.count < 2:
            raise NotMeasured(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def check(self) -> None:
        """Raises NotMeasured unless this is a mean with a covariance: finite, symmetric, >= 0."""
        if self.mean.ndim != 1 or not len(self.mean) or self.scatter.shape != 2 * self.mean.shape:
            raise NotMeasured(
                f"a mean of shape {tuple(self.mean.shape)} and a covariance of shape "
                f"{tuple(self.scatter.shape)} do not belong together"
            )
        covariance = self.covariance
        if not (self.mean.isfinite().all() and covariance.isfinite().all()):
            raise NotMeasured("mean or covariance is not finite")
        tolerance = _STORED_TOLERANCE * covariance.abs().max()
        if (covariance - covariance.T).abs().max() > tolerance:
            raise NotMeasured("the covariance is not symmetric")
        smallest = _eigenvalues(covariance).min().item()
        if smallest < -tolerance:
            raise NotMeasured(f"the covariance is negative: it has the eigenvalue {smallest:.3g}")


def _eigenvalues(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NotMeasured("the covariance has no eigenvalues that can be computed") from error


def frechet(one: Moments, other: Moments) -> float:
    """Fréchet distance of two Gaussians, |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    The root's trace is that of (L^T S2 L)^(1/2) with S1 = L L^T: symmetric, so that eigenvalues
    stay real and sets of fewer samples than dimensions do no harm.

    Raises:
        NotMeasured: Either side is no Gaussian: not finite, of one sample, not a covariance, or
            of another width.
    """
    for side in (one, other):
        side.check()
    _same_width(one.mean, other.mean)
    difference = one.mean - other.mean
    values, vectors = torch.linalg.eigh(one.covariance)
    kept = values > _RANK_TOLERANCE * values.max()
    factor = vectors[:, kept] * values[kept].sqrt()
    inner = _eigenvalues(factor.T @ other.covariance @ factor)
    distance = (
        difference @ difference
        + one.covariance.trace()
        + other.covariance.trace()
        - 2 * inner.clamp_min(0).sqrt().sum()
    ).item()
    if not math.isfinite(distance):
        raise NotMeasured("the numbers are too large for a distance")
    return max(0.0, distance)  # rounding alone makes it negative


def frechet_bias(dim: int, count: float, reference_count: float) -> float:
    """What ``frechet`` shows on average for two samples of one unit Gaussian: only bias."""
    return dim * (dim + 5) / 4 * (1 / count + 1 / reference_count)


class KernelDistance(NamedTuple):
    """KID with how it was estimated.

    Attributes:
        mean: Mean over the subsets.
        std: Standard deviation over the subsets; they overlap, so it is no error bar.
        full: The estimate from all samples at once, without any random choice.
    """

    mean: float
    std: float
    full: float


def kid(
    features: Tensor,
    reference: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    within_reference: Tensor | None = None,
) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x.y / d + 1)³; can be slightly negative.

    Args:
        features: (n, d).
        reference: (m, d).
        subsets: Number of random subsets, at least 1.
        subset_size: Samples of either side in each, drawn without replacement; fewer where
            there are not as many.
        seed: Of a generator of its own.
        within_reference: What ``kernel_within`` gives for these very numbers, if it is known.

    Raises:
        NotMeasured: There are fewer than two samples on a side, or the widths differ.
    """
    x, y = _checked_pair(features, reference)
    in_x, in_y = (z.to(x.device) for z in _subsets(len(x), len(y), subsets, subset_size, seed))
    if within_reference is None:
        within_reference = _mean_within(y, in_y)
    n, m = in_x.sum(1), in_y.sum(1)
    between = _kernel_sums(x, y, in_x, in_y) / (n * m)
    distance = _mean_within(x, in_x) + within_reference - 2 * between
    mean, std = distance[:-1].mean(), distance[:-1].std(unbiased=False)
    return KernelDistance(mean.item(), std.item(), distance[-1].item())


def kernel_within(
    reference: Tensor, count: int, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """The reference's own term of ``kid``, (subsets + 1,), for a ``count`` of other features."""
    y = _checked(reference)
    in_y = _subsets(count, len(y), subsets, subset_size, seed)[1]
    return _mean_within(y, in_y.to(y.device))


def _subsets(
    count: int, reference_count: int, subsets: int, subset_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Indicators of the random subsets of either side; the last row takes everything."""
    size = min(subset_size, count, reference_count)
    if size < 2:
        raise NotMeasured(
            f"KID needs at least 2 samples on either side, got {count}, {reference_count}"
        )
    generator = torch.Generator().manual_seed(seed)
    # Sums over a subset are u^T K u with its indicator u: one pass serves all subsets at once.
    in_x, in_y = (
        torch.zeros(subsets + 1, length, dtype=torch.float64)
        for length in (count, reference_count)
    )
    for row in range(subsets):
        in_x[row, torch.randperm(count, generator=generator)[:size]] = 1
        in_y[row, torch.randperm(reference_count, generator=generator)[:size]] = 1
    in_x[-1], in_y[-1] = 1, 1
    return in_x, in_y


def _mean_within(x: Tensor, in_x: Tensor) -> Tensor:
    n = in_x.sum(1)
    diagonal = in_x @ (((x * x).sum(1) / x.shape[1] + 1) ** 3)
    return (_kernel_sums(x, x, in_x, in_x) - diagonal) / (n * (n - 1))


def _kernel_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    total = x.new_zeros(len(in_x))
    for start in range(0, len(x), _TILE):
        rows = slice(start, start + _TILE)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3  # (tile, m)
        total += (in_x[:, rows] * (in_y @ kernel.T)).sum(1)
    return total


def inception_score(logits: Tensor, chunk: int = 5000) -> tuple[float, float]:
    """exp of the mean KL between each prediction and the marginal: mean and deviation over chunks.

    The order of the logits (n, classes) matters: images sorted by class score far too low, so
    shuffle them first. ADM's evaluator takes chunks of 5000.
    """
    scores = []
    for part in _checked(logits).log_softmax(1).split(chunk):
        probability = part.exp()
        marginal = probability.mean(0)
        divergence = torch.special.xlogy(probability, probability) - torch.special.xlogy(
            probability, marginal
        )
        scores.append(divergence.sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(unbiased=False).item()


def precision_recall(
    features: Tensor, reference: Tensor, k: int = 3, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Share of samples in the reference's manifold, and of the reference in the samples'.

    A manifold is the union of balls that reach to the k-th nearest neighbor of its own set. Two
    samples of one distribution do not score 1.

    Args:
        features: (n, d).
        reference: (m, d).
        k: Of the neighbors.
        reference_radii: ``radii(reference, k)``, if it is known.
    """
    x, y = _checked_pair(features, reference)
    x_radius, y_radius = radii(x, k), radii(y, k) if reference_radii is None else reference_radii
    is_real = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    is_reached = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for rows, distance in _distances(x, y):
        is_real[rows] = (distance <= y_radius).any(1)
        is_reached |= (distance <= x_radius[rows, None]).any(0)
    return is_real.double().mean().item(), is_reached.double().mean().item()


def density_coverage(
    features: Tensor, reference: Tensor, k: int = 5, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Mean number of reference balls around a sample, over k; share of balls with a sample.

    Unlike precision and recall they do not take an outlier's large ball at its word. Density is
    about 1 for the same distribution and may exceed it. Arguments as for ``precision_recall``.
    """
    x, y = _checked_pair(features, reference)
    radius = radii(y, k) if reference_radii is None else reference_radii
    inside = 0
    is_covered = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for _, distance in _distances(x, y):
        in_ball = distance < radius
        inside += int(in_ball.sum())
        is_covered |= in_ball.any(0)
    return inside / (k * len(x)), is_covered.double().mean().item()


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose logits (n, classes) are highest for the label (n,) asked for."""
    if len(logits) != len(labels) or not len(labels):
        raise NotMeasured(f"{len(logits)} predictions do not fit {len(labels)} labels")
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def radii(features: Tensor, k: int) -> Tensor:
    """Distance (n,) of each of (n, d) features to its k-th nearest neighbor among the others."""
    x = _checked(features)
    if len(x) <= k:
        raise NotMeasured(f"the {k}-th nearest neighbor needs more than {k} samples, got {len(x)}")
    return torch.cat(
        [distance.kthvalue(k + 1, dim=1).values for _, distance in _distances(x, x)]
    )  # the nearest of all is the point itself


def _distances(x: Tensor, y: Tensor) -> Iterable[tuple[slice, Tensor]]:
    # By differences, not by matrix product: equal points must be at distance exactly 0.
    for start in range(0, len(x), _TILE):
        rows = slice(start, start + _TILE)
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or not len(features):
        raise NotMeasured(f"features must be (n, d) with n > 0, got {tuple(features.shape)}")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(1)).sum())
        raise NotMeasured(
            f"{bad} of {len(features)} feature vectors are not finite; leave them out"
        )
    return features.double()


def _checked_pair(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _checked(features), _checked(reference)
    _same_width(x, y)
    return x, y


def _same_width(x: Tensor, y: Tensor) -> None:
    if x.shape[-1] != y.shape[-1]:
        raise NotMeasured(
            f"features of width {x.shape[-1]} do not compare with width {y.shape[-1]}; "
            f"take both from one extractor"
        )
