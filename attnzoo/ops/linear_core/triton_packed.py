"""Linear attention of packed tokens with what surrounds it, back into one gradient.

Focused attention maps queries and keys first, and a convolution of the values may be added. As
operators of their own these would leave a gradient each of queries, keys and values, which PyTorch
adds up and puts side by side.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import stencil, stencil_weight_gradient
from attnzoo.ops.dispatch import MACS
from attnzoo.ops.linear_core import linear_attention_macs
from attnzoo.ops.linear_core.triton import _linear_core, core_gradients, fake_core
from attnzoo.ops.power_map.triton import focus, focus_gradient
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import _rows, launched
from attnzoo.ops.triton_replay import replayed

SCHEMA = (
    "Tensor qkv, Tensor? weight, Tensor? bias, Tensor? scale, int heads, int height, int width, "
    "str activation, bool divide, float eps, float gamma, float offset"
)


@launched("packed_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _packed_core(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, heads: int,
    height: int, width: int, activation: str, divide: bool, eps: float, gamma: float,
    offset: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The result; what only a backward reads: of the core, then features and statistics."""
    qkv, _ = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    of_core, features, stats = (qkv.new_empty(0) for _ in range(3))
    if scale is not None:
        features, stats = focus(qkv, scale, gamma, offset, 2, True)
        query, key = features.chunk(2, dim=-1)
    out, state, inverse = _linear_core.function(query, key, value, heads, activation, divide, eps)
    if weight is not None:
        if inverse.numel():  # of wide heads
            of_core = out
        out = stencil(value, weight, bias, (height, width), out)
    return out, of_core, state, inverse, features, stats


@launched(
    "packed_core_backward",
    "(Tensor grad, Tensor of_core, Tensor state, Tensor inverse, Tensor features, Tensor stats, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _packed_core_backward(
    grad: Tensor, of_core: Tensor, state: Tensor, inverse: Tensor, features: Tensor,
    stats: Tensor, qkv: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, heads: int, height: int, width: int, activation: str, divide: bool,
    eps: float, gamma: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of packed tokens, and of the convolution's kernels and biases and the scale."""
    (qkv, _), (grad, _), grid = _rows(qkv), _rows(grad), (height, width)
    query, key, value = qkv.chunk(3, dim=-1)
    grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = grads.chunk(3, dim=-1)
    of_weight, of_bias, of_scale = (qkv.new_empty(0) for _ in range(3))
    if weight is not None:
        stencil(grad, weight, None, grid, is_transposed=True, out=parts[2])
        of_weight, of_bias = stencil_weight_gradient(value, grad, grid, weight)
    if scale is not None:
        query, key = features.chunk(2, dim=-1)
    saved = grad, of_core, state, inverse, query, key, value
    core_gradients(*saved, heads, activation, divide, eps, parts, weight is not None)
    if scale is not None:
        of_scale = focus_gradient(grads, qkv, scale, stats, gamma, offset, True, grads)
    return grads, of_weight, of_bias, of_scale


@_packed_core.register_fake
def _(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, heads: int,
    height: int, width: int, activation: str, divide: bool, eps: float, gamma: float,
    offset: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    value = qkv.chunk(3, dim=-1)[2]
    out, state, inverse = fake_core(value, value, value, heads, activation, divide)
    of_core = qkv.new_empty(out.shape if weight is not None and inverse.numel() else 0)
    b, n, c = out.shape
    is_mapped = scale is not None
    features = qkv.new_empty((b, n, 2 * c) if is_mapped else 0)
    stats = state.new_empty((3, 2, b * n)) if is_mapped else qkv.new_empty(0)
    return out, of_core, state, inverse, features, stats


@_packed_core_backward.register_fake
def _(
    grad: Tensor, of_core: Tensor, state: Tensor, inverse: Tensor, features: Tensor,
    stats: Tensor, qkv: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_weight, of_bias, of_scale = (qkv.new_empty(0) for _ in range(3))
    if weight is not None:
        of_weight, of_bias = weight.new_empty(weight.shape), weight.new_empty(len(weight))
    if scale is not None:
        of_scale = scale.new_empty(scale.shape)
    return qkv.new_empty(qkv.shape), of_weight, of_bias, of_scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, weight, bias, scale, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    out, of_core, state, inverse, *mapped = output
    if weight is None and inverse.numel():
        of_core = out
    ctx.save_for_backward(of_core, state, inverse, *mapped, qkv, weight, bias, scale)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    grads, *found = _packed_core_backward(grad, *saved, *ctx.options)
    found = [None if z is None else g.to(z.dtype) for g, z in zip(found, saved[-3:], strict=True)]
    return grads, *found, *(None for _ in range(8))


_packed_core.register_autograd(_gradients, setup_context=_setup)
_packed_core.register_inference(replayed(_packed_core.function, 1))


def packed_tokens(
    qkv: Tensor, heads: int, grid: tuple[int, int], activation: str, is_normalized: bool,
    eps: float, kernel: tuple[Tensor, Tensor | None] | None,
    mapped: tuple[Tensor, float, float] | None,
) -> Tensor:  # fmt: skip
    """``linear_tokens`` of packed tokens, of mapped queries and keys, plus a convolution.

    Args:
        qkv: (b, h * w, 3 * c).
        heads: As there, like ``activation``, ``is_normalized`` and ``eps``.
        grid: (h, w).
        kernel: The convolution's weight, 3x3 to 7x7 as in ``depthwise_conv``, and bias; or None.
        mapped: Scale before its softplus, exponent and offset of ``scaled_power_map``, or None.

    Returns:
        (b, h * w, c).
    """
    weight, bias = kernel or (None, None)
    scale, gamma, offset = mapped or (None, 1.0, 0.0)
    options = heads, *grid, activation, is_normalized, eps, gamma, offset
    return _packed_core(qkv.to(operand_dtype(qkv)), weight, bias, scale, *options)[0]


def _macs(qkv: Tensor, weight: Tensor | None, *others: Any, **_: Any) -> int:
    b, n, c = qkv.shape
    heads, divide = others[2], others[6]
    core = b * heads * linear_attention_macs(n, n, c // 3 // heads, c // 3 // heads, divide)
    return core + (0 if weight is None else b * n * c // 3 * weight[0].numel())


MACS |= {
    "packed_core": _macs,
    "packed_core_backward": lambda *operands, **_: 2 * _macs(*operands[6:]),
}
