"""A depthwise convolution of tokens in one launch, where a kernel for that runs."""

from __future__ import annotations

from torch import Tensor, nn

from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.ops import fused
from attnzoo.ops.precision import operand_dtype


def convolve_tokens(
    conv: DepthwiseConv, x: Tensor, grid: tuple[int, int], added: Tensor | None = None
) -> Tensor:
    """``conv`` of ``x``, to which ``added`` is added: (b, h * w, dim)."""
    branch, norm = conv.branches[0], conv.norms[0]
    is_stencil = branch.kernel_size == (3, 3) and isinstance(norm, nn.Identity)
    if is_stencil and len(conv.branches) == 1 and fused.runs_on(x, operand_dtype(x)):
        x = x.to(operand_dtype(x))
        return fused.depthwise3x3(x, branch.weight, branch.bias, grid, added)
    local = conv(x, grid)
    return local if added is None else added + local.to(added.dtype)
