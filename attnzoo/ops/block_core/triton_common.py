"""What kernels of states and of pairs of tokens share: features, the convolution, registration."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.block_core.torch import RELU_OFFSET
from attnzoo.ops.depthwise_conv.triton import stencil, stencil_weight_gradient

SCHEMA = (
    "Tensor qkv, Tensor mixing, Tensor? weight, Tensor? bias, int heads, int height, int width, "
    "int tall, int wide, float eps"
)
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
_OFFSET = tl.constexpr(RELU_OFFSET)


@triton.jit
def _tile(z, token, spacing, column, mask):
    return tl.load(z + token[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _phi(z):
    """In float32; like torch's ReLU it keeps a NaN."""
    return tl.maximum(z.to(tl.float32), 0.0, tl.PropagateNan.ALL) + _OFFSET


@triton.jit
def _features(z, mask):
    """phi of a tile, 0 outside."""
    return tl.where(mask, _phi(z), 0.0)


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def _convolved(
    value: Tensor, weight: Tensor | None, bias: Tensor | None, blocks: TokenBlocks
) -> Tensor:
    """To what attention is added, or in its place room."""
    if weight is None:
        return torch.empty(*value.shape, dtype=value.dtype, device=value.device)
    return stencil(value, weight, bias, blocks.grid)


def _of_convolution(
    grad: Tensor, value: Tensor, weight: Tensor | None, blocks: TokenBlocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Of values, kernels and biases; without a convolution none is of use."""
    if weight is None:
        return grad, _new(grad, 0), _new(grad, 0)
    local = stencil(grad, weight, None, blocks.grid, is_transposed=True)
    return local, *stencil_weight_gradient(value, grad, blocks.grid, weight)


def register(forward: Any, backward: Any) -> None:
    """``backward`` takes the gradient of the result, what else ``forward`` gives, its operands."""

    def fake(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        qkv, mixing, weight, _ = rest[-10:-6]
        sizes = ((0,), (0,)) if weight is None else (weight.shape, weight.shape[:1])
        like = mixing if weight is None else weight
        return *(z.new_empty(z.shape) for z in (qkv, mixing)), *map(like.new_empty, sizes)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *operands, ctx.heads, ctx.height, ctx.width, ctx.tall, ctx.wide, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *operands)

    def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        sizes = ctx.heads, ctx.height, ctx.width, ctx.tall, ctx.wide, ctx.eps
        of_qkv, *found = backward(grad, *saved, *sizes)
        learned = zip(found, saved[-3:], strict=True)
        found = [None if z is None else g.to(z.dtype) for g, z in learned]
        return of_qkv, *found, *(None,) * 6

    backward.register_fake(fake)
    forward.register_autograd(gradients, setup_context=setup)
