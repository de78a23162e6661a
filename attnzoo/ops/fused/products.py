"""Products of half-precision matrices with float32 sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.fused.support import operator

# torch before 2.8 cannot sum half-precision operands into a float32 result.
_HAS_WIDE_PRODUCT = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


def has_half_sums(*operands: Tensor) -> bool:
    """Whether to multiply in bfloat16 with float32 sums; float16 would overflow on rounding.

    Not while compiling: a compiler joins the float32 copies with what comes before them.
    """
    is_eager = _HAS_WIDE_PRODUCT and not torch.compiler.is_compiling()
    return is_eager and all(z.is_cuda and z.dtype == torch.bfloat16 for z in operands)


def wide_bmm(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    """(b, n, k), (b, k, m) -> (b, n, m), summed in float32; in float32 if ``is_wide``."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if not (a.is_cuda and _HAS_WIDE_PRODUCT):
        out = torch.bmm(a.float(), b.float())
        return out if is_wide else out.to(a.dtype)
    # A long sum is split among blocks, and those would add up in half precision.
    if is_wide or a.shape[2] > max(a.shape[1], b.shape[2]):
        out = torch.bmm(a, b, out_dtype=torch.float32)
        return out if is_wide else out.to(a.dtype)
    return torch.bmm(a, b)


@operator("half_matmul")
def _half_matmul(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    return wide_bmm(a, b, is_wide)


@_half_matmul.register_fake
def _(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32) if is_wide else a.dtype
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors
    grad = grad.to(a.dtype)
    return (
        _half_matmul(grad, b.mT, False) if ctx.needs_input_grad[0] else None,
        _half_matmul(a.mT, grad, False) if ctx.needs_input_grad[1] else None,
        None,
    )


_half_matmul.register_autograd(_matmul_backward, setup_context=_matmul_setup)


def half_matmul(a: Tensor, b: Tensor, is_wide: bool = True) -> Tensor:
    """Product of half-precision matrices, summed in float32, with gradients.

    Args:
        a: (..., n, k).
        b: (..., k, m).
        is_wide: Whether the result stays in float32 or is rounded, once, to the dtype of a.

    Returns:
        (..., n, m).
    """
    lead = a.shape[:-2]
    flat = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    out = _half_matmul(*flat, is_wide)
    return out.view(*lead, *out.shape[-2:])


def half_read(query: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Q times each factor in turn, in float32 at last: (..., n, d) and (..., d, e), ..."""
    for factor in factors[:-1]:
        query = half_matmul(query, factor.to(query.dtype), is_wide=False)
    factor = factors[-1]
    high = factor.to(query.dtype)
    if factor.shape[-1] > 1 or factor.dtype == query.dtype:
        return half_matmul(query, high)
    # Two half-precision columns carry a sum to twice the digits; one product serves both.
    columns = torch.cat([high, (factor - high.float()).to(query.dtype)], dim=-1)
    return half_matmul(query, columns).sum(-1, keepdim=True)


def half_kernel_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q (K^T V), (..., n, d) each, with the state summed in float32 and rounded once."""
    state = half_matmul(key.transpose(-2, -1), value)
    return half_matmul(query, state.to(query.dtype), is_wide=False)


def half_key_sums(query: Tensor, key: Tensor) -> Tensor:
    """Q sum_j K_j^T, (..., n, 1), in float32."""
    return half_read(query, [key.sum(-2, dtype=torch.float32).unsqueeze(-1)])
