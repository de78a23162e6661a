"""Linear attention by PyTorch's operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.errors import InvalidValue
from attnzoo.ops.dispatch import (
    custom_op,
    has_half_sums,
    has_wide_product,
    is_plain,
    loses_gradients,
)
from attnzoo.ops.precision import in_float32, in_wide_range


def elu_plus_one(z: Tensor) -> Tensor:
    """ELU(z) + 1, the positive kernel function of Linear Transformers (arXiv 2006.16236).

    As ReLU(z) + exp(min(z, 0)): -1 + 1 would leave nothing of a small exponential.
    """
    z = in_wide_range(z)
    return F.relu(z) + z.clamp_max(0).exp()


def check_activation(activation: str, is_normalized: bool) -> None:
    """Raises InvalidValue for what is no kernel function of ``linear_tokens``."""
    if activation not in ("relu", "elu", "softmax", "none"):
        known = "'relu', 'elu' (ELU + 1), 'softmax' or 'none'"
        raise InvalidValue(f"activation={activation!r}; give {known}")
    if activation == "softmax" and is_normalized:
        raise InvalidValue("activation='softmax' needs no normalizer; give is_normalized=False")


def activated(z: Tensor, activation: str) -> Tensor:
    """The kernel function of that name; z for "softmax", not one of queries and keys alike."""
    check_activation(activation, False)
    if activation == "relu":
        return F.relu(z)
    return elu_plus_one(z) if activation == "elu" else z


def query_softmax(query: Tensor, heads: int) -> Tensor:
    """Over the channels of each head: (b, n, h * d) -> (b, n, h * d)."""
    return query.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)


def key_softmax(key: Tensor) -> Tensor:
    """Over all tokens; in float32 for float16, in which 1 / n is no longer exact."""
    key = in_wide_range(key)
    # PyTorch's kernel along that axis leaves most of a GPU idle; a CPU would rather not copy.
    return key.mT.softmax(-1).mT if key.is_cuda else key.softmax(-2)


def features(
    query: Tensor, key: Tensor, heads: int, activation: str, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys after the kernel function of that name."""
    check_activation(activation, is_normalized)
    if activation == "softmax":
        return query_softmax(query, heads), key_softmax(key)
    return activated(query, activation), activated(key, activation)


def is_quadratic_cheaper(queries: int, keys: int, key_dim: int, value_dim: int) -> bool:
    """Whether (Q K^T) V takes fewer multiply-accumulates than Q (K^T V)."""
    if isinstance(keys, torch.SymInt):  # an export would hold for such sizes only
        return False
    return queries * keys * (key_dim + value_dim) < (queries + keys) * key_dim * value_dim


def wide_bmm(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    """(b, n, k), (b, k, m) -> (b, n, m), summed in float32; in float32 if ``is_wide``."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if not has_wide_product(a):
        out = torch.bmm(a.float(), b.float())
        return out if is_wide else out.to(a.dtype)
    # A long sum is split among blocks, and those would add up in half precision.
    if is_wide or a.shape[2] > max(a.shape[1], b.shape[2]):
        out = torch.bmm(a, b, out_dtype=torch.float32)
        return out if is_wide else out.to(a.dtype)
    return torch.bmm(a, b)


@custom_op("half_matmul")
def _half_matmul(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    return wide_bmm(a, b, is_wide)


@_half_matmul.register_fake
def _(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32) if is_wide else a.dtype
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors
    grad = grad.to(a.dtype)
    return (
        _half_matmul(grad, b.mT, False) if ctx.needs_input_grad[0] else None,
        _half_matmul(a.mT, grad, False) if ctx.needs_input_grad[1] else None,
        None,
    )


_half_matmul.register_autograd(_gradients, setup_context=_setup)


def half_matmul(a: Tensor, b: Tensor, is_wide: bool = True) -> Tensor:
    """Product of half-precision matrices, summed in float32, with gradients.

    Args:
        a: (..., n, k).
        b: (..., k, m).
        is_wide: Whether the result stays in float32 or is rounded, once, to the dtype of a.

    Returns:
        (..., n, m).
    """
    if a.dim() == 3:
        return _half_matmul(a, b, is_wide)
    lead = a.shape[:-2]
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    out = _half_matmul(a, b, is_wide)
    return out.view(*lead, *out.shape[-2:])


def _half_read(query: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
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


def half_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q K^T V, (..., n, d) each, in whichever order is less; the state is rounded once."""
    if query.shape[-2] < query.shape[-1]:
        return half_matmul(half_matmul(query, key.mT, is_wide=False), value, is_wide=False)
    state = half_matmul(key.mT, value).to(query.dtype)
    return half_matmul(query, state, is_wide=False)


def fold(key: Tensor, value: Tensor, queries: int | None) -> tuple[Tensor, ...]:
    """What ``read`` needs to know of keys and values: the factors of K^T V, multiplied or not.

    Args:
        key: (..., m, d), after the kernel function.
        value: (..., m, e).
        queries: How many will read; for few of them (K^T, V) is cheaper than K^T V. None
            always multiplies, so that the results of several blocks of keys can be added.

    Returns:
        Matrices whose product is (..., d, e), in float32 or better.
    """
    keys, key_dim = key.shape[-2:]
    if queries and is_quadratic_cheaper(queries, keys, key_dim, value.shape[-1]):
        return key.mT, value
    if is_plain(key, value):
        return (key.mT @ value,)
    if has_half_sums(key, value):
        return (half_matmul(key.mT, value),)
    return _fold(key, value)


@in_float32
def _fold(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (key.mT @ value,)


def key_sum(key: Tensor) -> tuple[Tensor, ...]:
    """The sum of all keys, as one factor for ``read``: (..., m, d) -> ((..., d, 1),)."""
    wide = torch.promote_types(key.dtype, torch.float32)
    return (key.sum(-2, dtype=wide).unsqueeze(-1),)


def wide_read(query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """``read`` whose result stays in float32 or better."""
    if is_plain(query, *state):
        for factor in state:
            query = query @ factor
        return query
    if has_half_sums(query):
        return _half_read(query, state)
    return _wide_read(query, state)[0]


@in_float32
def _wide_read(query: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    for factor in state:
        query = query @ factor
    return (query,)


def read(query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """Q K^T V without a normalizer, of what ``fold`` returned: (..., n, d) -> (..., n, e)."""
    return wide_read(query, state).to(query.dtype)


class _Quotient(torch.autograd.Function):
    """x / norm, which keeps the result; autograd would keep x and make three tensors more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor) -> Tensor:
        out = x / norm
        ctx.save_for_backward(out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, norm = ctx.saved_tensors
        grad = grad / norm
        return grad, -(grad * out).sum(-1, keepdim=True)


def quotient(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm; without a gradient x itself is overwritten: (..., n, e), (..., n, 1)."""
    if loses_gradients():  # those of PyTorch's division may need x again
        return x / norm
    return _Quotient.apply(x, norm) if torch.is_grad_enabled() else x.div_(norm)


def normalized_read(
    query: Tensor, state: tuple[Tensor, ...], sums: tuple[Tensor, ...], eps: float
) -> Tensor:
    """Q (K^T V) / (Q sum_j K_j^T + eps), of what ``fold`` and ``key_sum`` returned."""
    return quotient(wide_read(query, state), wide_read(query, sums) + eps).to(query.dtype)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """See ``attnzoo.ops.linear_core``."""
    return normalized_read(query, fold(key, value, query.shape[-2]), key_sum(key), eps)


def linear_tokens(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, activation: str = "none",
    is_normalized: bool = True, eps: float = 1e-15,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.linear_core``."""
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=-1)
    query, key = features(query, key, heads, activation, is_normalized)
    dtype = value.dtype
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    state = fold(key, value, query.shape[-2])
    sums = key_sum(key) if is_normalized else None
    out = read(query, state) if sums is None else normalized_read(query, state, sums, eps)
    return out.transpose(1, 2).flatten(2).to(dtype)
