"""Batch norms over the batches of all processes of a run.

Norms that stand beside one another share one collective forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.ops import processes


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all processes; torch's own ``SyncBatchNorm`` refuses a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w), of the same shape in every process -> the same shape."""
        if self.training and batches_of(self) > 1:
            return normed_sum([self], [input])
        return super().forward(input)


def share_batch_statistics(model: nn.Module) -> None:
    """Makes every batch norm of a model normalize over the batches of all processes.

    That takes the default process group, and from every process a batch of one shape.

    Args:
        model: Changed in place; with one process it computes what it did.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d


def batches_of(norm: nn.Module) -> int:
    """Of how many processes the batches are that a norm in training normalizes over."""
    return processes.count() if isinstance(norm, SharedBatchNorm2d) else 1


def normed_sum(norms: Sequence[nn.BatchNorm2d], images: Sequence[Tensor]) -> Tensor:
    """The sum of images, each normed over the batches of all processes.

    Args:
        norms: In training, of one eps and with or without weights alike; their running statistics
            move.
        images: (b, c, h, w) each, of one type.

    Returns:
        (b, c, h, w).
    """
    number, first = batches_of(norms[0]), images[0]
    gains = shifts = first.new_zeros(len(norms), first.shape[1])
    if norms[0].affine:
        gains, shifts = (torch.stack([getattr(n, z) for n in norms]) for z in ("weight", "bias"))
    else:
        gains = gains + 1
    out, means, variances = _NormedSum.apply(number, norms[0].eps, gains, shifts, *images)
    move_statistics(norms, means, variances, number * first.numel() // first.shape[1])
    return out


@torch.no_grad()
def move_statistics(
    norms: Sequence[nn.BatchNorm2d], means: Tensor, variances: Tensor, pixels: int
) -> None:
    """Moves running statistics towards those of a batch.

    Args:
        norms: The norms.
        means: (norms, c).
        variances: Biased, (norms, c).
        pixels: Of how many.
    """
    variances = variances.detach() * (pixels / max(1, pixels - 1))
    for norm, mean, variance in zip(norms, means.detach(), variances, strict=True):
        if norm.running_mean is None or norm.running_var is None:
            continue
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        # Without a momentum, the mean over all batches.
        share: Any = norm.momentum
        share = 1 / norm.num_batches_tracked.float() if share is None else share
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


class _NormedSum(torch.autograd.Function):
    """With the means and biased variances of all processes, (images, c) each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, number: int, eps: float, gains: Tensor, shifts: Tensor, *images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(images[0].dtype, torch.float32)
        moments = [_moments(image.to(wide)) for image in images]
        # Means and variances, not sums of squares: those of numbers far from 0 lose digits.
        all_means, all_variances = processes.gathered(
            torch.stack([torch.stack(pair) for pair in zip(*moments, strict=True)]), number
        ).unbind(1)
        means = all_means.mean(0)
        variances = (all_variances + (all_means - means).square()).mean(0)
        inverses = (variances + eps).rsqrt()
        scales = gains.to(wide) * inverses
        out = torch.zeros_like(images[0], dtype=wide)
        for image, mean, scale in zip(images, means, scales, strict=True):
            out = out + (image.to(wide) - _over(mean)) * _over(scale)
        out = out + _over(shifts.to(wide).sum(0))
        ctx.number = number
        ctx.mark_non_differentiable(means, variances)
        ctx.save_for_backward(gains, means, inverses, *images)
        return out.to(images[0].dtype), means, variances

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gains, means, inverses, *images = ctx.saved_tensors
        wide = means.dtype
        grad, pixels = grad.to(wide), ctx.number * grad.numel() // grad.shape[1]
        sums = [grad.sum((0, 2, 3))]
        for image, mean in zip(images, means, strict=True):
            sums.append((grad * (image.to(wide) - _over(mean))).sum((0, 2, 3)))
        own = torch.stack(sums)
        total, *along = (processes.summed(own) / pixels).unbind(0)
        slopes = []
        for k, image in enumerate(images):
            factor = along[k] * inverses[k].square()
            slope = grad - _over(total) - (image.to(wide) - _over(means[k])) * _over(factor)
            slopes.append((slope * _over(gains[k].to(wide) * inverses[k])).to(image.dtype))
        # Not expanded: gradients that share memory would be clipped once for each.
        shifts = own[:1].repeat(len(images), 1)
        return None, None, own[1:] * inverses, shifts, *slopes


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x - _over(mean)).square().mean((0, 2, 3))


def _over(x: Tensor) -> Tensor:
    """(c,), to be added to images."""
    return x[:, None, None]
