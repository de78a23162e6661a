"""Depthwise convolution of tokens on their grid, plain or re-parameterised (ACNet, 1908.03930)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.layers.shared_norm import (
    SharedBatchNorm2d,
    batches_of,
    move_statistics,
    normed_sum,
)
from attnzoo.ops.depthwise_conv import (
    depthwise_conv,
    depthwise_conv_macs,
    to_image,
    to_tokens,
)
from attnzoo.ops.depthwise_conv.native import branch_conv
from attnzoo.ops.dispatch import Impl, choose, is_bare, is_few, is_watched

ConvKind = Literal["acnet", "3x3", "5x5", "none"]


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding that keeps the grid.

    Args:
        dim: Channels.
        kind: "acnet" sums a 3x3, a 3x1 and a 1x3 branch, each with its own batch norm, and folds
            them into one 3x3 kernel by ``fuse``; "3x3" and "5x5" are one kernel with bias.
    """

    branches: Any
    norms: Any

    def __init__(self, dim: int, kind: ConvKind) -> None:
        super().__init__()
        self.dim = dim
        self.kind = kind
        sizes = {"3x3": [(3, 3)], "5x5": [(5, 5)]}.get(kind, [(3, 3), (3, 1), (1, 3)])
        is_single = kind in ("3x3", "5x5")
        self.branches = nn.ModuleList(
            nn.Conv2d(
                dim, dim, size, padding=(size[0] // 2, size[1] // 2), groups=dim, bias=is_single
            )
            for size in sizes
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(dim) if kind == "acnet" else nn.Identity() for _ in sizes
        )

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        added: Tensor | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """Convolves tokens on their grid.

        Args:
            x: (b, h * w, dim).
            grid: (h, w).
            added: (b, h * w, dim), to which the result is added, or None.
            impl: See ``attnzoo.ops.depthwise_conv``.

        Returns:
            (b, h * w, dim).
        """
        branches: Any = self._modules["branches"]._modules  # pyright: ignore[reportOptionalMemberAccess]
        if len(branches) == 1:
            [branch] = branches.values()
            return depthwise_conv(x, grid, branch.weight, branch.bias, added, impl=impl)
        # A counter is to see the branches as they stand.
        if not (self.training or impl == "reference" or is_watched()):
            branches = []
            for branch, norm in zip(self.branches, self.norms, strict=True):
                branches += [branch.weight, norm.running_mean, norm.running_var]
                branches += [norm.weight, norm.bias]
            if is_few("branch_conv", impl, x, *branches, x if added is None else added):
                return branch_conv(x, grid, branches, self.norms[0].eps, added)
            return depthwise_conv(x, grid, *self.merged(), added, impl=impl)
        if self.is_joined(x, impl):
            return self._joined(x, grid, added)
        parts = list(zip(self.branches, self.norms, strict=True))
        # Together, for one collective; one value of a channel has no variance.
        are_shared = all(norm.training and batches_of(norm) > 1 for norm in self.norms)
        together = [parts] if are_shared and x.numel() > self.dim else [[part] for part in parts]
        images = [_normed_branches(x, grid, some, impl) for some in together]
        out = to_tokens(sum(images[1:], images[0]))
        return out if added is None else added + out.to(added.dtype)

    def is_joined(self, x: Tensor, impl: Impl = "auto") -> bool:
        """Whether kernels compute the normed branches of a batch as one convolution."""
        # One value of a channel has no variance.
        if len(self.branches) == 1 or x.numel() == self.dim:
            return False
        kind = type(self.norms[0])
        if kind not in (nn.BatchNorm2d, SharedBatchNorm2d):
            return False
        for norm in self.norms:
            is_live = type(norm) is kind and norm.training and norm.momentum
            if not (is_live and norm.affine and norm.track_running_stats):
                return False
        return choose("depthwise_conv", impl, x) == "triton"

    def _joined(self, x: Tensor, grid: tuple[int, int], added: Tensor | None) -> Tensor:
        from attnzoo.ops.depthwise_conv.triton_branches import normed_branches

        weights, gains, shifts, eps, number = self.joined_operands()
        out, means, variances = normed_branches(
            x, grid, weights, gains, shifts, eps, added, number
        )
        self.move(means, variances, x)
        return out

    def joined_operands(self) -> tuple[Any, ...]:
        """Weights, the norms' weights and biases, (3, c), their eps, how many norm together."""
        gains, shifts = ([getattr(norm, z) for norm in self.norms] for z in ("weight", "bias"))
        weights = tuple(branch.weight for branch in self.branches)
        norm: Any = self.norms[0]
        return weights, torch.stack(gains), torch.stack(shifts), norm.eps, batches_of(norm)

    def move(self, means: Tensor, variances: Tensor, x: Tensor) -> None:
        """Moves running statistics towards those of a batch x, (3, c) each."""
        pixels = batches_of(self.norms[0]) * x.numel() // self.dim
        move_statistics(list(self.norms), means, variances, pixels)

    @property
    def kernel(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the one convolution that this is, or None if it is more."""
        branches: Any = self._modules["branches"]._modules  # pyright: ignore[reportOptionalMemberAccess]
        if len(branches) > 1 or not is_bare(self, (DepthwiseConv,)):
            return None
        [branch] = branches.values()
        return branch.weight, branch.bias

    @property
    def reach(self) -> int:
        """Rows up and down that an output depends on."""
        return self.branches[0].kernel_size[0] // 2

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample, of the branches as they stand."""
        return sum(depthwise_conv_macs(branch.weight, grid) for branch in self.branches)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one 3x3 kernel that all branches are in eval mode."""
        kernels, biases = [], []
        for branch, norm in zip(self.branches, self.norms, strict=True):
            weight, dtype = branch.weight, branch.weight.dtype
            wide = torch.promote_types(dtype, torch.float32)
            scale = norm.weight * (norm.running_var.to(wide) + norm.eps).rsqrt()
            kernels.append(weight * scale.view(-1, 1, 1, 1))
            biases.append(torch.addcmul(norm.bias.to(wide), norm.running_mean, scale, value=-1))
        square, column, row = kernels
        square.narrow(3, 1, 1).add_(column)
        square.narrow(2, 1, 1).add_(row)
        return square.to(dtype), (biases[0] + biases[1] + biases[2]).to(dtype)

    @torch.no_grad()
    def fuse(self) -> ConvKind:
        """Folds all branches into one kernel with bias; the eval-mode output stays the same.

        Returns:
            The kind that describes the result.
        """
        if len(self.branches) == 1:
            return "5x5" if self.kind == "5x5" else "3x3"
        weight, bias = self.merged()
        fused = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim).to(weight)
        fused.load_state_dict({"weight": weight, "bias": bias})
        self.branches, self.norms = nn.ModuleList([fused]), nn.ModuleList([nn.Identity()])
        self.kind = "3x3"
        return "3x3"


def fuse_conv(layer: Any) -> dict[str, Any]:
    """``Attention.fuse`` of a mechanism whose ``conv`` is such a convolution, or None.

    Args:
        layer: The mechanism; its config says afterwards what the convolution is.

    Returns:
        The options that changed.
    """
    if layer.conv is None:
        return {}
    changed = {"conv": layer.conv.fuse()}
    layer.config = replace(layer.config, **changed)
    return changed


class ValueConv(nn.Module):
    """The convolution of values of FLatten: all heads share the kernels of one head's channels.

    Args:
        dim: Channels of a token.
        num_heads: Number of heads.
        kind: See ``DepthwiseConv``; not "none".
    """

    def __init__(self, dim: int, num_heads: int, kind: ConvKind) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.conv = DepthwiseConv(dim // num_heads, kind)

    def forward(
        self,
        value: Tensor,
        grid: tuple[int, int],
        added: Tensor | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim); see ``DepthwiseConv.forward``."""
        branches = self.conv.branches._modules
        if len(branches) > 1:
            # The batch norms' statistics are those of all heads.
            parts = rearrange(value, "b n (h c) -> (b h) n c", h=self.num_heads)
            out = self.conv(parts, grid, impl=impl)
            out = rearrange(out, "(b h) n c -> b n (h c)", h=self.num_heads)
            return out if added is None else added + out.to(added.dtype)
        [branch] = branches.values()
        return depthwise_conv(value, grid, branch.weight, branch.bias, added, impl=impl)

    @property
    def kernel(self) -> tuple[Tensor, Tensor | None] | None:
        """See ``DepthwiseConv.kernel``."""
        return self.conv.kernel if is_bare(self, (ValueConv,)) else None

    @property
    def reach(self) -> int:
        """Rows up and down that an output depends on."""
        return self.conv.reach

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample, of the branches as they stand."""
        return self.num_heads * self.conv.macs(grid)

    def fuse(self) -> ConvKind:
        """See ``DepthwiseConv.fuse``."""
        return self.conv.fuse()


def _normed_branches(
    x: Tensor,
    grid: tuple[int, int],
    parts: list[tuple[nn.Conv2d, nn.BatchNorm2d]],
    impl: Impl,
) -> Tensor:
    """The sum of norm(branch(x)); what norms store in training is convolved again later.

    Three branches would store three tensors of the image's size, and a depthwise convolution is
    cheap.
    """
    branches, norms = zip(*parts, strict=True)
    images = []
    for branch in branches:
        out = depthwise_conv(x, grid, branch.weight, branch.bias, impl=impl)
        images.append(to_image(out, grid))
    if not norms[0].training:
        return norms[0](images[0])
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _normed(norms, images)
    dtype = images[0].dtype
    places = {image.untyped_storage()._cdata: place for place, image in enumerate(images)}

    def drop(saved: Tensor) -> Tensor | int:
        return places.get(saved.untyped_storage()._cdata, saved)

    def restore(saved: Tensor | int) -> Tensor:
        if not isinstance(saved, int):
            return saved
        branch = branches[saved]
        bias = None if branch.bias is None else branch.bias.to(dtype)
        with torch.no_grad():
            again = depthwise_conv(x.to(dtype), grid, branch.weight.to(dtype), bias, impl=impl)
            return to_image(again, grid)

    with torch.autograd.graph.saved_tensors_hooks(drop, restore):
        return _normed(norms, images)


def _normed(norms: Sequence[nn.BatchNorm2d], images: list[Tensor]) -> Tensor:
    """The sum of norm(x); one value of a channel takes the running statistics."""
    if len(norms) > 1:
        return normed_sum(norms, images)
    [norm], [x] = norms, images
    if norm.training and x.numel() == x.shape[1]:
        mean, variance = norm.running_mean, norm.running_var
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)
