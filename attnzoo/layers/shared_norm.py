"""Batch norms over the batches of all processes of a run.

Norms that stand beside one another share one collective forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from attnzoo.ops import processes
from attnzoo.ops.dispatch import is_transformed


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
    wide = torch.promote_types(first.dtype, torch.float32)
    gains = first.new_ones(len(norms), first.shape[1], dtype=wide)
    shifts = torch.zeros_like(gains)
    if norms[0].affine:
        gains = torch.stack([norm.weight for norm in norms]).to(wide)
        shifts = torch.stack([norm.bias for norm in norms]).to(wide)
    out, means, variances = _NormedSum.apply(number, norms[0].eps, gains, shifts, *images)
    move_statistics(norms, means, variances, number * first.numel() // first.shape[1])
    return out.to(first.dtype)


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
    momenta: set[Any] = {norm.momentum if norm.track_running_stats else None for norm in norms}
    if len(momenta) == 1 and None not in momenta and not (is_compiling() or is_transformed()):
        # All at once: launches for each would take as long as a small convolution.
        running: list[Any] = [norm.running_mean for norm in norms]
        running += [norm.running_var for norm in norms]
        found = [z.to(running[0].dtype) for z in (means.detach(), variances)]
        batches: list[Any] = [norm.num_batches_tracked for norm in norms]
        foreach: Any = torch  # whose stubs do not export these
        foreach._foreach_add_(batches, 1)
        foreach._foreach_lerp_(running, [row for z in found for row in z], momenta.pop())
        return
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
    """In the type of gains and shifts, with the means and biased variances of all processes.

    Torch 2.11 compiles an output that is a cast to its own type to gradients of 0.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, number: int, eps: float, gains: Tensor, shifts: Tensor, *images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = gains.dtype
        moments = [_moments(image.to(wide)) for image in images]
        # Means and variances, not sums of squares: those of numbers far from 0 lose digits.
        own = torch.stack([torch.stack(some) for some in zip(*moments, strict=True)])
        all_means, all_variances = processes.gathered(own, number).unbind(1)
        means = all_means.mean(0)
        variances = (all_variances + (all_means - means).square()).mean(0)
        inverses = (variances + eps).rsqrt()
        out = _over(shifts.sum(0))
        for image, mean, scale in zip(images, means, gains * inverses, strict=True):
            out = out + (image.to(wide) - _over(mean)) * _over(scale)
        ctx.number = number
        ctx.save_for_backward(gains, means, inverses, *images)
        return out, means, variances

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gains, means, inverses, *images = ctx.saved_tensors
        pixels = ctx.number * grad.numel() // grad.shape[1]
        sums = [grad.sum((0, 2, 3))]
        for image, mean in zip(images, means, strict=True):
            sums.append((grad * (image.to(gains.dtype) - _over(mean))).sum((0, 2, 3)))
        own = torch.stack(sums)
        whole = processes.summed(own) / pixels
        factors, scales = whole[1:] * inverses.square(), gains * inverses
        slopes = []
        for image, *rows in zip(images, means, factors, scales, strict=True):
            mean, factor, scale = map(_over, rows)
            slope = grad - _over(whole[0]) - (image.to(gains.dtype) - mean) * factor
            slopes.append((slope * scale).to(image.dtype))
        # Not expanded: gradients that share memory would be clipped once for each.
        return None, None, own[1:] * inverses, own[:1].repeat(len(images), 1), *slopes


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x - _over(mean)).square().mean((0, 2, 3))


def _over(x: Tensor) -> Tensor:
    """(c,), to be added to images."""
    return x[:, None, None]
