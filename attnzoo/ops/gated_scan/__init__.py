"""Gated linear attention (GLA, arXiv 2312.06635): a recurrence with one decay per key channel.

S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t and o_t = q_t S_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor, compiler

from attnzoo.ops.dispatch import Impl, choose
from attnzoo.ops.gated_scan.reference import gated_linear_attention as _recurrence
from attnzoo.ops.gated_scan.torch import gated_linear_block

__all__ = [
    "Direction",
    "counted_as_recurrence",
    "gated_linear_attention",
    "gated_linear_attention_macs",
    "gated_linear_block",
    "scan",
    "unscan",
]

Direction = Literal["forward", "backward", "columns-forward", "columns-backward"]

_is_counting: ContextVar[bool] = ContextVar("_is_counting", default=False)


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, impl: Impl = "auto"
) -> Tensor:
    """Causal linear attention whose state decays by exp(log_gate) per key channel.

    Time and memory are linear in n.

    Args:
        query: (b, h, n, dk), scaled by the caller.
        key: (b, h, n, dk).
        value: (b, h, n, dv).
        log_gate: (b, h, n, dk), not positive.
        impl: "torch" is exact for any gates and never looks at the data. "auto" looks at the gates
            and takes the fastest form that is exact for them, but is "torch" while compiling and
            everywhere but on a CPU: on the meta device there is nothing to look at, and a GPU
            would have to be waited for. "fla" is flash-linear-attention's kernel, on a GPU.

    Returns:
        (b, h, n, dv), in the dtype of ``query``; the state stays in float32 or better.

    Raises:
        Unavailable: The library cannot be imported, or not run on these tensors.
    """
    if not compiler.is_compiling() and _is_counting.get():
        return (query * log_gate.exp()) @ (key.transpose(-2, -1) @ value)
    chosen = choose("gated_linear_attention", impl, query)
    if chosen == "reference":
        return _recurrence(query, key, value, log_gate)
    if chosen == "fla":
        from attnzoo.ops.gated_scan import fla

        return fla.gated_linear_attention(query, key, value, log_gate)
    form: Impl = "auto" if impl == "auto" else "torch"
    return gated_linear_block(query, key, value, log_gate, None, form)[0].to(query.dtype)


def gated_linear_attention_macs(tokens: int, key_dim: int, value_dim: int) -> int:
    """Multiply-accumulates of one head of one scan, as the recurrence does them.

    k_t^T v_t and q_t S_t take key_dim * value_dim each. The chunkwise forms trade the recurrence
    for products inside each chunk and do more: 64 (key_dim + value_dim) per token on top.
    """
    return 2 * tokens * key_dim * value_dim


@contextmanager
def counted_as_recurrence() -> Iterator[None]:
    """Inside, ``gated_linear_attention`` multiplies as the recurrence does, whatever ``impl``.

    Linear attention without gates stands in: it multiplies as much, forward and backward, and is
    quick to trace where the recurrence takes one step per token. Its numbers mean nothing.
    """
    token = _is_counting.set(True)
    try:
        yield
    finally:
        _is_counting.reset(token)


def scan(x: Tensor, grid: tuple[int, int], direction: Direction) -> Tensor:
    """Puts tokens in the order of a scan.

    Args:
        x: (b, height * width, ...), row by row.
        grid: (height, width).
        direction: "backward" is the reverse of "forward", which is row by row; "columns-..." goes
            column by column.

    Returns:
        (b, height * width, ...).
    """
    if direction.startswith("columns"):
        x = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return x.flip(1) if direction.endswith("backward") else x


def unscan(x: Tensor, grid: tuple[int, int], direction: Direction) -> Tensor:
    """Inverse of ``scan``."""
    x = x.flip(1) if direction.endswith("backward") else x
    if direction.startswith("columns"):
        x = x.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
    return x
